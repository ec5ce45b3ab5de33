"""Pretraining: minimise -sum log p over the scored tokens of an objective's batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lmexp.contracts import IGNORE_INDEX, Batch
from lmexp.task.base import BaseTask, split_batch


class Pretrain(BaseTask):
    """A language model under an objective; validation sums the metric over all tokens of the split."""

    def __init__(self, metric: Metric, **base: Any) -> None:
        super().__init__(**base)
        self.metric = metric

    def loss_sum(self, batch: Batch) -> Tensor:
        hidden = self.model(**batch["inputs"])  # (B, T, D)
        return self.model.head.loss(hidden.flatten(0, 1), batch["labels"].flatten())  # type: ignore[operator, union-attr]

    def on_validation_epoch_start(self) -> None:
        self.metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            for micro in split_batch(batch, self.micro_batch_size):
                scored = (micro["labels"] != IGNORE_INDEX).sum()
                self.metric.update(self.loss_sum(micro), scored, micro["n_bytes"].double().sum())

    def on_validation_epoch_end(self) -> None:
        """Write the numbers of the split under val/, against the optimizer step."""
        values = {f"val/{name}": value for name, value in self.metric.compute().items()}
        self.trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
        if self.logger is not None and self.trainer.state.fn == "fit":
            self.logger.log_metrics(values, step=self.trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
