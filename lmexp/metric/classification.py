"""How right labels are told, and how rightly they are believed in: over a whole split, with intervals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as f
from torch import Tensor
from torchmetrics import Metric

from lmexp.contracts import IGNORE_INDEX, UserError

N_BINS = 15
"""Of equal width, for the expected calibration error (Guo et al. 2017, section 2)."""


@dataclass(frozen=True)
class Predictions:
    """What was told of each text of a split, in its order."""

    probabilities: Tensor
    """(n, classes) float32."""

    labels: Tensor
    """(n,) int64, or (n, classes) of 0 and 1 where a text may have several."""

    places: Tensor
    """(n,) int64: the row of the split."""

    groups: Tensor
    """(n,) int64: the kind of example."""

    nats: Tensor
    """(n,) float32: -log p of the label, or the mean over the classes."""

    @property
    def multilabel(self) -> bool:
        """Whether a text may have several labels."""
        return self.labels.dim() == 2

    @property
    def told(self) -> Tensor:
        """(n,) the most probable class, or (n, classes) 1 for each class at least as probable as not."""
        return (self.probabilities >= 0.5).long() if self.multilabel else self.probabilities.argmax(-1)

    @property
    def right(self) -> Tensor:
        """(n,) bool: whether the label, or the whole set of them, was told."""
        same = self.told == self.labels
        return same.all(-1) if self.multilabel else same

    def where(self, chosen: Tensor) -> Predictions:
        """Of these texts only: a mask or numbers (n',)."""
        return Predictions(
            self.probabilities[chosen], self.labels[chosen], self.places[chosen], self.groups[chosen], self.nats[chosen]
        )


class ClassificationScores(Metric):
    """Keeps what was told of each text, and scores it at the end; the same for any number of devices.

    Scores, all in [0, 1] but for the loss: `loss`, nats a label; `accuracy`, of whole label sets; `f1`, the mean over
    classes that occur, and `f1/<class>`; `matthews` correlation, in [-1, 1]; `auroc`, the mean over classes, each
    against the rest, left out where none has a rest; `ece`, the expected calibration error of the most probable class
    (of each class, where there may be several). For groups of examples `accuracy/<group>`.
    """

    full_state_update = False
    probabilities: list[Tensor]
    labels: list[Tensor]
    places: list[Tensor]
    groups: list[Tensor]
    nats: list[Tensor]

    def __init__(self, bootstrap: int) -> None:
        """`bootstrap` resamples of the examples for the intervals of a final evaluation; 0: none."""
        if not isinstance(bootstrap, int) or bootstrap < 0 or bootstrap == 1:
            raise UserError(f"metric.bootstrap={bootstrap}; expected 0, or some hundreds of resamples.")
        super().__init__()
        self.bootstrap = bootstrap
        for name in ("probabilities", "labels", "places", "groups", "nats"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.classes: tuple[str, ...] = ()
        self.multilabel = False
        self.group_names: tuple[str, ...] = ()

    def bind(self, classes: Sequence[str], multilabel: bool, groups: Sequence[str]) -> None:
        """What the corpus decides."""
        self.classes = tuple(classes)
        self.multilabel = multilabel
        self.group_names = tuple(groups) if len(groups) > 1 else ()

    @property
    def names(self) -> tuple[str, ...]:
        """What `compute` gives."""
        own = (*(f"f1/{name}" for name in self.classes), *(f"accuracy/{name}" for name in self.group_names))
        return ("loss", "accuracy", "f1", "matthews", "auroc", "ece", *own)

    def update(self, logits: Tensor, labels: Tensor, places: Tensor, groups: Tensor) -> None:
        """Add a batch: logits (N, classes), labels (N,) or (N, classes), places and groups (N,); texts without a label
        are left out."""
        if self.multilabel and labels.dim() == 1:  # of a device without work
            labels = labels[:, None].expand(-1, len(self.classes))
        scored = (labels != IGNORE_INDEX) if labels.dim() == 1 else (labels != IGNORE_INDEX).all(-1)
        logits, labels = logits.detach()[scored].float(), labels[scored]
        if self.multilabel:
            probabilities = logits.sigmoid()
            nats = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
        else:
            probabilities = logits.softmax(-1)
            nats = F.cross_entropy(logits, labels, reduction="none")
        self.probabilities.append(probabilities)
        self.labels.append(labels)
        self.places.append(places[scored])
        self.groups.append(groups[scored])
        self.nats.append(nats)

    def predictions(self) -> Predictions:
        """All that were added, of all devices inside `sync_context`, in the order of the split."""
        found = {}
        for name in ("probabilities", "labels", "places", "groups", "nats"):
            value = getattr(self, name)
            found[name] = (torch.cat(value) if isinstance(value, list) else value).cpu()
        order = found["places"].argsort(stable=True)
        return Predictions(**{name: value[order] for name, value in found.items()})

    def compute(self) -> dict[str, float]:
        """The scores; see the class."""
        return self.scores(self.predictions())

    def scores(self, predictions: Predictions, intervals: bool = False) -> dict[str, float]:
        """The scores of these; with `intervals` also `<score>_ci`, half the width of its 95 % interval by resampling
        the examples (Efron 1979), equal for equal predictions."""
        if not len(predictions.labels):
            return {}
        result = self._all(predictions)
        if not intervals or not self.bootstrap:
            return result
        rng = np.random.default_rng(0)
        n = len(predictions.labels)
        drawn = [self._all(predictions.where(torch.from_numpy(rng.integers(n, size=n)))) for _ in range(self.bootstrap)]
        for name in list(result):
            low, high = np.quantile([scores[name] for scores in drawn if name in scores] or [np.nan], (0.025, 0.975))
            if np.isfinite(high - low):
                result[f"{name}_ci"] = float(high - low) / 2
        return result

    def _all(self, p: Predictions) -> dict[str, float]:
        result = {"loss": float(p.nats.double().mean()), "accuracy": float(p.right.double().mean())}
        n = len(self.classes)
        plain: dict[str, Any] = {"validate_args": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class without examples has no curve, which is left out of the mean
            if p.multilabel:
                options: dict[str, Any] = {"num_labels": n, **plain}
                f1 = f.multilabel_f1_score(p.told, p.labels, average="none", **options)
                result["matthews"] = matthews(p.told.flatten(), p.labels.flatten(), 2)
                curves = f.multilabel_auroc(p.probabilities, p.labels, average="none", **options)
                occurs = p.labels.any(0) & ~p.labels.bool().all(0)
                certain, told = p.probabilities.flatten(), p.labels.flatten()
                result["ece"] = float(f.binary_calibration_error(certain, told, n_bins=N_BINS, **plain))
            else:
                options = {"num_classes": n, **plain}
                f1 = f.multiclass_f1_score(p.told, p.labels, average="none", **options)
                result["matthews"] = matthews(p.told, p.labels, n)
                curves = f.multiclass_auroc(p.probabilities, p.labels, average="none", **options)
                counts = torch.bincount(p.labels, minlength=n)
                occurs = (counts > 0) & (counts < len(p.labels))
                result["ece"] = float(
                    f.multiclass_calibration_error(p.probabilities, p.labels, n_bins=N_BINS, **options)
                )
        occurring = (p.labels.any(0) if p.multilabel else torch.bincount(p.labels, minlength=n) > 0) | _told(p, n)
        result["f1"] = float(f1[occurring].double().mean())
        if occurs.any():
            result["auroc"] = float(curves[occurs].double().mean())
        result |= {f"f1/{name}": float(value) for name, value in zip(self.classes, f1, strict=True)}
        for number, group in enumerate(self.group_names):
            of = p.groups == number
            if of.any():
                result[f"accuracy/{group}"] = float(p.right[of].double().mean())
        return result


def matthews(told: Tensor, labels: Tensor, n_classes: int) -> float:
    """The correlation of what was told and the labels, both (n,), in [-1, 1] (Gorodkin 2004, equation 8); 0 where one
    of them is always the same, as scikit-learn has it (torchmetrics has another value there)."""
    counts = torch.bincount(labels * n_classes + told, minlength=n_classes**2).reshape(n_classes, n_classes).double()
    total, labelled, as_told = counts.sum(), counts.sum(1), counts.sum(0)
    together = counts.trace() * total - labelled @ as_told
    apart = ((total**2 - labelled @ labelled) * (total**2 - as_told @ as_told)).sqrt()
    return float(together / apart) if apart > 0 else 0.0


def _told(p: Predictions, n: int) -> Tensor:
    """(classes,) whether each was told of any text."""
    return p.told.any(0) if p.multilabel else torch.bincount(p.told, minlength=n) > 0
