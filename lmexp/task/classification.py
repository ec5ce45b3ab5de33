"""Classification: a language model with a head over classes, minimising -sum log p(label | text)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmexp.contracts import IGNORE_INDEX, Batch, UserError
from lmexp.metric.classification import ClassificationScores, Predictions
from lmexp.model.classifier import POOLINGS, ClassifierHead, Pooling, pool
from lmexp.task.base import BaseTask, split_batch


class TextClassification(BaseTask):
    """Any family with `ClassifierHead` in place of its own head.

    A text has one label, or, where the corpus says so, any number of them, each class then told by itself; the loss of
    such a text is the sum over classes, and the mean is over texts and classes.
    """

    def __init__(
        self,
        model: Any,
        metric: ClassificationScores,
        pooling: Pooling | None,
        hidden_layer: bool,
        dropout: float,
        class_weights: str | Sequence[float] | None,
        label_smoothing: float,
        flops_per_token: float,
        input_dropout: float | None = None,  # runs of before it have none in their configuration
        **base: Any,
    ) -> None:
        """`class_weights`: of each class's loss, `balanced`: n / (classes * n of the class); None: all 1."""
        family: str = model.family
        if pooling not in (None, *POOLINGS):
            raise UserError(f"task.pooling={pooling}; expected {', '.join(POOLINGS)} or null.")
        if pooling == "first" and family != "encoder":
            raise UserError(
                f"task.pooling=first with a model of the family {family.replace('_', '-')}: its first position sees "
                "nothing of what follows; set task.pooling=last or mean."
            )
        shares = {"dropout": dropout, "input_dropout": input_dropout, "label_smoothing": label_smoothing}
        for name, value in shares.items():
            if value is not None and not 0 <= value < 1:
                raise UserError(f"task.{name}={value}; expected a share of at least 0 and less than 1.")
        classes = metric.classes
        self._check_weights(class_weights, classes)
        if metric.multilabel and label_smoothing:
            raise UserError("task.label_smoothing is of texts with one label, and these have several; set it to 0.")
        # looked up only, when the head that multiplies with it is gone; an encoder-decoder counts half a pair of tokens
        unused = sum(p.numel() for p in model.head.parameters())
        chosen: Pooling = pooling or ("first" if family == "encoder" else "last")
        width = model.embed.weight.shape[1]
        model.head = ClassifierHead(width, classes, hidden_layer, dropout, chosen, metric.multilabel, input_dropout)
        super().__init__(
            model=model,
            metric=metric,
            flops_per_token=flops_per_token - (3.0 if family == "encoder_decoder" else 6.0) * unused,
            **base,
        )
        self.pooling = chosen
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self._weights: Tensor | None = None
        self.predictions: Predictions | None = None
        """What it told of each text."""

    def adapt(self, seed: int) -> None:
        super().adapt(seed)
        self.model.head.requires_grad_(True)  # it is new, there is nothing to adapt

    @staticmethod
    def _check_weights(weights: Any, classes: Sequence[str]) -> None:
        if weights in (None, "balanced"):
            return
        fits = not isinstance(weights, str) and len(weights) == len(classes) and all(w >= 0 for w in weights)
        if not fits or not sum(weights):
            raise UserError(
                f"task.class_weights={weights}; expected balanced, null, or {len(classes)} numbers of at least 0, one "
                f"for each of {', '.join(classes)}."
            )

    def on_fit_start(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        if weights == "balanced":
            labels = torch.from_numpy(self.trainer.datamodule.labels("train")[0])  # type: ignore[attr-defined]
            n = len(self.metric.classes)
            counts = labels.sum(0) if labels.dim() == 2 else torch.bincount(labels, minlength=n)
            self._weights = (len(labels) / (n * counts.clamp_min(1))).float().to(self.device)
        else:
            self._weights = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def logits(self, batch: Batch) -> Tensor:
        """(B, K, classes) float32, for each text of each row."""
        inputs = batch["inputs"]
        hidden = self.model(**inputs)  # (B, T, D)
        documents = inputs["decoder_documents"] if "decoder_documents" in inputs else inputs["documents"]
        pooled = pool(hidden, documents, batch["labels"].shape[1], self.pooling)
        return self.model.head(pooled).float()  # type: ignore[operator]

    def loss_sum(self, batch: Batch) -> Tensor:
        logits, labels = self.logits(batch), batch["labels"]
        if self.metric.multilabel:
            losses = F.binary_cross_entropy_with_logits(
                logits, labels.clamp_min(0).float(), weight=self._weights, reduction="none"
            )
            return (losses * (labels != IGNORE_INDEX)).sum()
        return F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            weight=self._weights,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            for micro in split_batch(batch, self.micro_batch_size):
                texts = (micro["labels"], micro["places"], micro["parts"])
                self.metric.update(self.logits(micro).flatten(0, 1), *(column.flatten(0, 1) for column in texts))

    test_step = validation_step

    def measure(self, final: bool) -> dict[str, float]:
        with self.metric.sync_context():
            self.predictions = self.metric.predictions()
        return self.metric.scores(self.predictions, final) | {"tokens": len(self.predictions.labels)}
