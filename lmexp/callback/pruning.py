"""Ends a job of a sweep that is behind the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lmexp.callback.base import RunCallback
from lmexp.contracts import UserError


class Pruning(RunCallback):
    """After each validation the search is told the metric, and says whether the job should go on.

    `trial`: Optuna's, on the first rank; the others follow it.
    """

    def __init__(self, trial: Any, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        behind = torch.zeros((), device=trainer.strategy.root_device)
        if self.monitor not in self.session.metrics:
            raise UserError(
                f"sweep.monitor={self.monitor} is not measured at a validation; expected one of "
                f"{', '.join(sorted(t for t in self.session.metrics if t.startswith('val/')))}."
            )
        if self.trial is not None:
            self.trial.report(self.session.metrics[self.monitor], trainer.global_step)
            behind += self.trial.should_prune() and trainer.global_step < self.session.max_steps
        if trainer.world_size > 1:
            dist.all_reduce(behind)
        if behind.item():
            trainer.should_stop = True
            self.session.stopped_early = True
            self.session.metrics["pruned"] = 1.0
            self.session.terminal.print(f"Pruned after step {trainer.global_step}: other jobs of the sweep are ahead.")
