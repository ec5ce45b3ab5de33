"""Ends a run whose validation no longer gets better."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lmexp.callback.base import RunCallback
from lmexp.contracts import UserError


class EarlyStopping(RunCallback):
    """Counts validations since the best one (Prechelt 1998); checkpoints keep the count, so a resumed run stops where
    an uninterrupted one does."""

    def __init__(self, patience: int | None, monitor: str | None, mode: str, min_delta: float) -> None:
        if patience is not None and (not isinstance(patience, int) or patience < 1):
            raise UserError(f"callback.early_stopping.patience={patience}; expected at least 1 validation, or null.")
        if mode not in ("min", "max"):
            raise UserError(f"callback.early_stopping.mode={mode}; expected min or max.")
        if min_delta < 0:
            raise UserError(f"callback.early_stopping.min_delta={min_delta}; expected a number of at least 0.")
        self.patience = patience
        self.follow(monitor, mode)
        self.min_delta = min_delta
        self.idle = patience is None
        """Nothing to do: the job leaves it out."""
        self.best: float | None = None
        self.waited = 0

    def follow(self, monitor: str | None, mode: str) -> None:
        """Look at this metric."""
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        assert self.monitor is not None, "check has it follow the checkpoint's"
        score = self.session.metrics[self.monitor]
        if self.best is None or self.sign * score < self.sign * self.best - self.min_delta:
            self.best, self.waited = score, 0
            return
        self.waited += 1
        assert self.patience is not None
        if self.waited >= self.patience:
            trainer.should_stop = True
            self.session.stopped_early = True
            self.session.terminal.print(
                f"Stopped after step {trainer.global_step}: {self.monitor} has not been better than {self.best:.5g} in "
                f"{self.waited} validations."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited = state_dict["best"], state_dict["waited"]
