"""What a classifier told, as pictures and tables: confusion, calibration, precision and recall, the worst mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.markup import escape
from rich.table import Table

from lmexp.callback.base import Scoring
from lmexp.contracts import UserError
from lmexp.corpus.labelled import COLUMNS
from lmexp.metric.classification import N_BINS, Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NAMED = 30  # classes that a matrix has room to name


class LabelReport(Scoring):
    """Draws what was told of the validation split at each validation; has the records of a tested split."""

    def __init__(self, shown: int) -> None:
        """`shown`: mistakes in the table, the surest first."""
        if not isinstance(shown, int) or shown < 0:
            raise UserError(f"callback.predictions.shown={shown}; expected a whole number of at least 0.")
        self.shown = shown
        self.measured = {}
        self._task: Any = None

    @property
    def told(self) -> Predictions:
        """What the task told of the last split."""
        found: Predictions = self._task.predictions
        return found

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._task = pl_module
        if trainer.state.fn != "fit" or not isinstance(trainer.logger, TensorBoardLogger):
            return
        self.split = "validation"
        names = self.data.corpus.labels
        with self.session.pause():
            for tag, figure in figures(self.told, names).items():
                trainer.logger.experiment.add_figure(tag, figure, trainer.global_step)
            trainer.logger.experiment.add_text("mistakes", self.markdown(), trainer.global_step)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._task = pl_module  # which has not measured yet

    def records(self) -> list[dict[str, Any]]:
        told, names, rows = self.told, self.data.corpus.labels, self.data.corpus.rows(self.split)
        found = []
        for place, label, probabilities in zip(
            told.places.tolist(), told.labels.tolist(), told.probabilities.tolist(), strict=True
        ):
            row = rows[place]
            right: Any = label_names(label, names, told.multilabel)
            found.append(
                {
                    "place": place,
                    **{name: row[name] for name in COLUMNS[: self.data.corpus.n_texts]},
                    "label": right,
                    **answer(probabilities, names, told.multilabel),
                }
            )
        return found

    def _mistakes(self) -> list[tuple[float, list[str], str, str]]:
        """(how sure, texts, label, told) of those told wrong, the surest first."""
        told, names, rows = self.told, self.data.corpus.labels, self.data.corpus.rows(self.split)
        sure = torch.maximum(told.probabilities, 1 - told.probabilities).mean(-1)
        if not told.multilabel:
            sure = told.probabilities.max(-1).values
        wrong = (~told.right).nonzero().flatten()
        found = []
        for i in wrong[sure[wrong].argsort(descending=True, stable=True)][: self.shown].tolist():
            row = rows[int(told.places[i])]
            texts = [row[name] for name in COLUMNS[: self.data.corpus.n_texts]]
            pair = (label_names(x.tolist(), names, told.multilabel) for x in (told.labels[i], told.told[i]))
            right, wrongly = (", ".join(x) if isinstance(x, list) else x for x in pair)
            found.append((float(sure[i]), texts, right, wrongly))
        return found

    def markdown(self) -> str:
        """The surest mistakes as a table for TensorBoard."""
        lines = ["| sure | text | label | told |", "|---:|---|---|---|"]
        for sure, texts, right, wrongly in self._mistakes():
            text = " / ".join(texts).replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {sure:.0%} | {text} | {right} | {wrongly} |")
        return "\n".join(lines)

    def table(self) -> Table:
        """The same for the terminal."""
        table = Table(title="The surest mistakes", title_justify="left", show_lines=True)
        table.add_column("sure", justify="right")
        for name in ("text", "label", "told"):
            table.add_column(name)
        for sure, texts, right, wrongly in self._mistakes():
            table.add_row(f"{sure:.0%}", escape("\n".join(texts)), escape(right), escape(wrongly))
        return table


def label_names(label: Any, names: tuple[str, ...], multilabel: bool) -> Any:
    """A class number as its name; a row of 0 and 1 as the names of the classes with 1."""
    return [name for name, there in zip(names, label, strict=True) if there] if multilabel else names[label]


def answer(probabilities: list[float], names: tuple[str, ...], multilabel: bool) -> dict[str, Any]:
    """What is told of a text, for a line of JSON: `told`, the class or the classes, and `probabilities` by name."""
    told: Any
    if multilabel:
        told = [name for name, p in zip(names, probabilities, strict=True) if p >= 0.5]
    else:
        told = names[int(np.argmax(probabilities))]
    return {"told": told, "probabilities": {n: round(p, 6) for n, p in zip(names, probabilities, strict=True)}}


def figures(told: Predictions, names: tuple[str, ...]) -> dict[str, Figure]:
    """Tag -> picture."""
    table = confusions(told, names) if told.multilabel else confusion(told, names)
    return {"confusion": table, "reliability": reliability(told), "precision_recall": precision_recall(told, names)}


def confusion(told: Predictions, names: tuple[str, ...]) -> Figure:
    """How often each label was told as each class; shares of the label's row."""
    from matplotlib.figure import Figure

    n = len(names)
    counts = torch.bincount(told.labels * n + told.told, minlength=n * n).reshape(n, n).numpy()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure = Figure(figsize=(2.5 + 0.5 * min(n, 20), 2.2 + 0.45 * min(n, 20)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="told", ylabel="label", title="Confusion")
    if n <= _MOST_NAMED:
        axes.set_xticks(range(n), names, rotation=45 if n > 3 else 0)
        axes.set_yticks(range(n), names)
        for y in range(n):
            for x in range(n):
                color = "white" if shares[y, x] > 0.5 else "black"
                axes.text(x, y, str(counts[y, x]), ha="center", va="center", color=color, fontsize=9)
    return figure


def confusions(told: Predictions, names: tuple[str, ...]) -> Figure:
    """Where texts may have several labels: of each of the first classes how many texts have it, and whether it was
    told; shares of those that have it, and of those that don't."""
    from matplotlib.figure import Figure

    names = names[:_MOST_NAMED]
    has, says = (x[:, : len(names)].bool().numpy() for x in (told.labels, told.told))
    counts = np.stack([(has & says).sum(0), (has & ~says).sum(0), (~has & says).sum(0), (~has & ~says).sum(0)], 1)
    of = np.stack([has.sum(0)] * 2 + [(~has).sum(0)] * 2, 1)
    shares = counts / np.maximum(1, of)
    figure = Figure(figsize=(5.2, 1.6 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(title="Confusion")
    axes.set_xticks(range(4), ["told", "missed", "told wrongly", "not told"])
    axes.set_yticks(range(len(names)), names)
    for y in range(len(names)):
        for x in range(4):
            color = "white" if shares[y, x] > 0.5 else "black"
            axes.text(x, y, str(counts[y, x]), ha="center", va="center", color=color, fontsize=9)
    return figure


def reliability(told: Predictions) -> Figure:
    """How often what was told with a certain probability was right, and how many texts that were."""
    from matplotlib.figure import Figure

    if told.multilabel:
        sure, right = told.probabilities.flatten().numpy(), told.labels.flatten().bool().numpy()
    else:
        sure, right = told.probabilities.max(-1).values.numpy(), told.right.numpy()
    bins = np.minimum((sure * N_BINS).astype(int), N_BINS - 1)
    counts = np.bincount(bins, minlength=N_BINS)
    there = counts > 0
    mean = np.bincount(bins, weights=sure, minlength=N_BINS)[there] / counts[there]
    share = np.bincount(bins, weights=right, minlength=N_BINS)[there] / counts[there]
    figure = Figure(figsize=(4.5, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color="gray", linewidth=1, linestyle="--", label="calibrated")
    upper.plot(mean, share, marker="o", label="told")
    upper.set(ylabel="share that is right", ylim=(0, 1), title="Reliability")
    upper.legend(loc="upper left")
    lower.bar((np.arange(N_BINS) + 0.5) / N_BINS, counts, width=0.9 / N_BINS)
    lower.set(xlabel="probability of what was told", ylabel="texts", xlim=(0, 1))
    return figure


def precision_recall(told: Predictions, names: tuple[str, ...]) -> Figure:
    """A curve for each of the first ten classes, told against the rest, over all thresholds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(names[:10]):
        right = (told.labels[:, number] == 1) if told.multilabel else (told.labels == number)
        order = told.probabilities[:, number].argsort(descending=True, stable=True)
        hits = right[order].numpy().cumsum()
        if not hits[-1]:
            continue
        axes.plot(hits / hits[-1], hits / np.arange(1, len(hits) + 1), label=name)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), title="Precision and recall")
    axes.legend(loc="lower left", fontsize=8)
    return figure
