"""Callbacks that tests put into runs: what goes wrong, and what is to be seen."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lmexp.callback.base import RunCallback


class Planted(RunCallback):
    """At step 3 of the job with this learning rate and seed."""

    def __init__(self, crash: list[float], spoil: list[float]) -> None:
        self.crash, self.spoil = crash, spoil

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        config = self.session.record["config"]
        me = [config["optimizer"]["lr"], config["seed"]]
        if trainer.global_step == 3 and me == self.crash:
            raise RuntimeError("planted crash")
        if trainer.global_step == 3 and me == self.spoil:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))


class Elsewhere(RunCallback):
    """The second process goes on from another sample."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.datamodule.samples_seen += 8 * trainer.global_rank  # type: ignore[attr-defined]


class Rows(RunCallback):
    """Writes a line for each step and device: what its rows of the batch were."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rows = [hash(tuple(row)) for row in batch["inputs"]["tokens"].tolist()]
        with open(f"{self.folder}/rows-{trainer.global_rank}.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps([trainer.global_step, trainer.global_rank, rows]) + "\n")
