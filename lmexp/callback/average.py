"""An exponential moving average of the weights (Polyak & Juditsky 1992; as in Tarvainen & Valpola 2017)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lmexp.callback.base import RunCallback
from lmexp.contracts import UserError
from lmexp.optimizer.sharding import is_in_pieces, local, pieces_like, shares_of


class WeightAverage(RunCallback):
    """a <- decay a + (1 - decay) w after each step; validation, samples and `best.ckpt` use a.

    Checkpoints hold the average under `average`, beside the weights that training goes on from.
    """

    def __init__(self, decay: float | None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"callback.average.decay={decay}; expected a number above 0 and below 1, or null.")
        self.decay = decay
        self.idle = decay is None
        """Nothing to do: the job leaves it out."""
        self._average: dict[str, Tensor] = {}
        self._swapped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.decay is None:
            return
        live = _weights(pl_module)
        if not self._average:
            self._average = {name: p.detach().clone() for name, p in live.items()}
        self._average = {
            name: a if is_in_pieces(a) else pieces_like(a.to(live[name].device), live[name])
            for name, a in self._average.items()
        }

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.decay is not None:
            averages = [local(a) for a in self._average.values()]
            torch._foreach_lerp_(averages, [local(p) for p in _weights(pl_module).values()], 1 - self.decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.decay is not None and trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert not self._swapped
        if self.decay is not None:
            saved = getattr(trainer.strategy, "saved", None)  # as the weights are
            shares = shares_of(pl_module)
            checkpoint["average"] = dict(self._average) if saved is None else saved(self._average, shares)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.decay is not None:
            self._average = checkpoint["average"]

    @torch.no_grad()
    def _swap(self, module: LightningModule) -> None:
        for name, p in _weights(module).items():
            live, average = local(p), local(self._average[name])
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)
        self._swapped = not self._swapped


def _weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
