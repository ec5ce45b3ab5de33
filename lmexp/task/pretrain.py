"""Pretraining: minimise -sum log p over the scored tokens of an objective's batches."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from lmexp.contracts import IGNORE_INDEX, Batch, UserError
from lmexp.metric.language_modeling import LanguageModeling
from lmexp.model.layers import Head
from lmexp.task.base import BaseTask, split_batch


class Pretrain(BaseTask):
    """A language model under an objective; validation sums the metric over all tokens of the split."""

    def __init__(self, metric: LanguageModeling, label_smoothing: float = 0.0, **base: Any) -> None:
        """`label_smoothing`: share of each target that is spread over all tokens in training; see `Head.smoothing`."""
        super().__init__(metric=metric, **base)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing}; expected a share of at least 0 and less than 1.")
        head = self.model.head
        if label_smoothing and (not isinstance(head, Head) or head.softcap is not None):
            raise UserError(
                f"task.label_smoothing={label_smoothing} with a model whose logits are capped, or model=auto; set it "
                "to 0, or model.softcap=null."
            )
        self.label_smoothing = label_smoothing

    def loss_sum(self, batch: Batch) -> Tensor:
        return self._loss(batch, "sum")

    def _loss(self, batch: Batch, reduction: Literal["sum", "none"]) -> Tensor:
        hidden = self.model(**batch["inputs"])  # (B, T, D)
        if "scored" in batch:
            hidden = hidden.gather(1, batch["scored"][..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, D)
        labels, head = batch["labels"].flatten(), cast(Head, self.model.head)
        loss = head.loss(hidden.flatten(0, 1), labels, reduction=reduction)
        if self.label_smoothing and reduction == "sum":
            loss = loss + self.label_smoothing * head.smoothing(hidden.flatten(0, 1), labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            for micro in split_batch(batch, self.micro_batch_size):
                losses = self._loss(micro, "none")
                labels = micro["labels"]
                self.metric.update(losses.sum(), (labels != IGNORE_INDEX).sum(), micro["n_bytes"].sum())
                if self.metric.parts:
                    parts = micro["parts"] if "parts" in micro else torch.zeros_like(labels)
                    self.metric.update_parts(losses, labels.flatten(), parts.flatten())

    test_step = validation_step

    def measure(self, final: bool) -> dict[str, float]:
        measured = dict(self.metric.compute())
        with self.metric.sync_context():
            measured["tokens"] = int(self.metric.tokens)
        return measured
