"""What goes wrong in one job of a sweep, as a callback: a crash or a number that is no number."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lmexp.callback.base import RunCallback


class Planted(RunCallback):
    """At step 3 of the job with this learning rate and seed."""

    def __init__(self, crash: list[float], nan: list[float]) -> None:
        self.crash, self.nan = crash, nan

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        config = self.session.record["config"]
        me = [config["optimizer"]["lr"], config["seed"]]
        if trainer.global_step == 3 and me == self.crash:
            raise RuntimeError("planted crash")
        if trainer.global_step == 3 and me == self.nan:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))
