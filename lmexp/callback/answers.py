"""What a model writes for the sources of a split, beside the references, and how near it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.markup import escape
from rich.table import Table

from lmexp.callback.base import Scoring
from lmexp.contracts import Family, UserError
from lmexp.data.loader import data_group, data_share
from lmexp.decoding.beam import Beam
from lmexp.decoding.generate import Sampling, generate
from lmexp.metric import summarization, text_to_text
from lmexp.objective.text_to_text import TextToText
from lmexp.optimizer.sharding import gathered


class Answer(NamedTuple):
    """A source with what was written for it."""

    place: int
    """Among the pairs that were asked for."""

    source: str
    reference: str
    output: str


class Kind(NamedTuple):
    """How outputs are scored."""

    names: tuple[str, ...]
    """Of the scores of all together."""

    scores: Callable[[Sequence[str], Sequence[str], Sequence[str], int], dict[str, float]]
    """Of outputs, references and sources, with so many resamples for intervals."""

    name: str
    """Of the score of a single one."""

    of_each: Callable[[Sequence[Answer]], list[float]]

    signature: Callable[[], str | None]
    """What to cite with the scores."""


def _translation(tokenize: str) -> Kind:
    text_to_text.check_tokenizer(tokenize)
    return Kind(
        text_to_text.SCORES,
        lambda outputs, references, sources, resamples: text_to_text.scores(outputs, references, resamples, tokenize),
        "chrF",
        lambda answers: [text_to_text.sentence_chrf(a.output, a.reference) for a in answers],
        lambda: text_to_text.signatures(tokenize),
    )


def _summarization(tokenize: str) -> Kind:
    if tokenize != "13a":
        raise UserError(
            f"callback.answers.tokenize={tokenize} is of BLEU, and callback.answers.score=summarization has none; set "
            "it to 13a."
        )
    return Kind(
        summarization.SCORES,
        summarization.scores,
        "rougeL",
        lambda answers: summarization.rouge([a.output for a in answers], [a.reference for a in answers])["rougeL"],
        lambda: None,
    )


_KINDS = {"translation": _translation, "summarization": _summarization}


def fitted(sampling: Sampling | Beam, objective: TextToText, block_size: int, family: Family) -> Sampling | Beam:
    """The same with no more tokens than a target has room for; `UserError` if it is to have more."""
    room = objective.lengths(block_size, family)[1]
    if sampling.min_new_tokens > room:
        raise UserError(
            f"decoding.min_new_tokens={sampling.min_new_tokens}, and a target has room for {room} tokens; set it to "
            "less, or for training objective.max_target and data.block_size to more."
        )
    return dataclasses.replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))


def write_for(
    model: Any,
    sources: Sequence[np.ndarray],
    objective: TextToText,
    block_size: int,
    tokenizer: Any,
    sampling: Sampling | Beam,
    batch_size: int,
    first: int = 0,
) -> list[list[int]]:
    """The tokens that a model writes for each source (n,), which are read as in training; eos ends them. What is drawn
    by lot depends on a source's number, from `first` on."""
    prompts = [objective.prompt(source, tokenizer, model.family, block_size).tolist() for source in sources]
    sampling = fitted(sampling, objective, block_size, model.family)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equally long ones need no padding
    written: list[list[int]] = [[] for _ in prompts]
    # eager: each new token is another shape, which a compiled model would be compiled for
    with torch.compiler.set_stance("force_eager"):
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            asked = [prompts[i] for i in places]
            numbers = [first + i for i in places]
            rows = generate(model, asked, sampling, tokenizer.eos_id, tokenizer.vocab_size, numbers=numbers)
            for place, row in zip(places, rows, strict=True):
                written[place] = row
    return written


class Answers(Scoring):
    """Decodes validation sources at each validation, and a whole split when a checkpoint is tested.

    Each pair is decoded once, by one device; the scores are of all of them. Everything written stands in `latest`.
    """

    sampling: Sampling | Beam

    def __init__(
        self,
        examples: int | None,
        batch_size: int,
        shown: int,
        bootstrap: int,
        score: str = "translation",
        tokenize: str = "13a",
    ) -> None:
        if score not in _KINDS:
            raise UserError(f"callback.answers.score={score}; expected {' or '.join(_KINDS)}.")
        for name, value, least in (
            ("examples", 1 if examples is None else examples, 1),
            ("batch_size", batch_size, 1),
            ("shown", shown, 0),
            ("bootstrap", bootstrap, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"callback.answers.{name}={value}; expected a whole number of at least {least}.")
        if bootstrap == 1:
            raise UserError("callback.answers.bootstrap=1; one resample has no interval: expected 0, or some hundreds.")
        self.kind = _KINDS[score](tokenize)
        self.names = self.kind.names
        """What is measured under val/."""
        self.examples = examples
        self.batch_size = batch_size
        self.shown = shown
        self.bootstrap = bootstrap
        self.latest: list[Answer] = []
        self.measured: dict[str, float] = {}

    @cached_property
    def signature(self) -> str | None:  # type: ignore[override]
        return self.kind.signature()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        with self.session.pause():
            self._measure(trainer, pl_module, "validation", self.examples, 0)
        values = {f"val/{name}": value for name, value in self.measured.items()}
        self.session.metrics |= values
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.log_metrics(values, step=trainer.global_step)
            trainer.logger.experiment.add_text("answers", self.markdown(), trainer.global_step)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """While the devices are still connected."""
        self._measure(trainer, pl_module, self.split, self.most, self.bootstrap)

    def _measure(self, trainer: Trainer, task: Any, split: str, most: int | None, bootstrap: int) -> None:
        with trainer.precision_plugin.forward_context(), gathered(task.model):
            own = self._answers(task.model, split, most)
        shares: list[Any] = [own]
        n = data_share(trainer)[1]
        if n > 1:
            shares = [None] * n
            dist.all_gather_object(shares, own, group=data_group(trainer))
        self.latest = sorted(answer for share in shares for answer in share)
        columns = [a.output for a in self.latest], [a.reference for a in self.latest], [a.source for a in self.latest]
        self.measured = self.kind.scores(*columns, bootstrap)

    def _answers(self, model: Any, split: str, most: int | None) -> list[Answer]:
        data, tokenizer = self.data, self.data.tokenizer
        pairs = data.pairs(split, most)
        sources = [sample.tokens for _, sample in pairs]
        rows = write_for(model, sources, data.objective, data.block_size, tokenizer, self.sampling, self.batch_size)
        answers = []
        for (place, sample), row in zip(pairs, rows, strict=True):
            source, reference = data.original(split, sample)
            answers.append(Answer(place, source, reference.strip(), tokenizer.decode(row, skip_special=True).strip()))
        return answers

    def records(self) -> list[dict[str, Any]]:
        of_each = self.kind.of_each(self.latest)
        return [{**a._asdict(), self.kind.name: round(score, 2)} for a, score in zip(self.latest, of_each, strict=True)]

    def ranked(self) -> list[tuple[float, Answer]]:
        """The answers by their own score, the worst first."""
        scored = zip(self.kind.of_each(self.latest), self.latest, strict=True)
        return sorted(scored, key=lambda pair: (pair[0], pair[1].place))

    def _extremes(self) -> list[tuple[float, Answer]]:
        ranked = self.ranked()
        if len(ranked) <= 2 * self.shown:
            return ranked
        return ranked[: self.shown] + ranked[len(ranked) - self.shown :]

    def markdown(self) -> str:
        """The worst and the best as a table for TensorBoard."""
        cells = ([f"{score:.0f}", a.source, a.reference, a.output] for score, a in self._extremes())
        lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in cells]
        return "\n".join(
            [f"| {self.kind.name} | source | reference | output |", "|---:|---|---|---|", *(f"| {x} |" for x in lines)]
        )

    def table(self) -> Table:
        """The same for the terminal."""
        table = Table(title="Worst and best", title_justify="left", show_lines=True, caption=self.signature)
        table.caption_justify = "left"
        table.add_column(self.kind.name, justify="right")
        for name in ("source", "reference", "output"):
            table.add_column(name)
        for score, a in self._extremes():
            table.add_row(f"{score:.0f}", *(escape(text) for text in a[1:]))
        return table
