"""Texts with labels, as samples: one text or two each, all of them once in each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmexp.contracts import Sample, Split
from lmexp.corpus.labelled import COLUMNS, LabelledCorpus
from lmexp.data.mixture import Side, TextOrder


def is_labelled(corpus: Any) -> bool:
    """Whether its texts have labels."""
    return hasattr(corpus, "n_texts")


@dataclass(frozen=True)
class Column:
    """One of the texts of each row, as a corpus of its own."""

    corpus: LabelledCorpus
    name: str

    streaming = False

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those of the corpus."""
        return self.corpus.splits

    def fingerprint(self) -> str:
        """That of the corpus, and which column."""
        return f"{self.corpus.fingerprint()} {self.name}"

    def rows(self, split: Split) -> Any:
        """The column as `text`."""
        return self.corpus.rows(split).select_columns([self.name]).rename_columns({self.name: "text"})


def columns(corpus: LabelledCorpus) -> tuple[Column, ...]:
    """The text, or the two texts, of each row."""
    return tuple(Column(corpus, name) for name in COLUMNS[: corpus.n_texts])


@dataclass(frozen=True)
class AllTexts:
    """The training texts of all columns, to learn a vocabulary from, as the `rows` of a corpus."""

    corpus: LabelledCorpus

    streaming = False

    def fingerprint(self) -> str:
        return f"{self.corpus.fingerprint()} all texts"

    def rows(self, split: Any) -> AllTexts:
        return self

    def iter(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of rows, as `datasets` gives them."""
        for column in columns(self.corpus):
            yield from column.rows("train").iter(batch_size)


def labels_of(corpus: LabelledCorpus, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The labels of a split, (n,) int64, or (n, classes) of 0 and 1 where a text may have several; the groups (n,)."""
    rows = corpus.rows(split).with_format(None)
    groups = np.asarray(rows["group"][:], dtype=np.int64)
    found = rows["label"][:]
    if not corpus.multilabel:
        return np.asarray(found, dtype=np.int64), groups
    labels = np.zeros((len(found), len(corpus.labels)), dtype=np.int64)
    for row, numbers in enumerate(found):
        labels[row, numbers] = 1
    return labels, groups


class Examples:
    """Labelled texts: in training in an order of their own for each epoch, in evaluation as they stand."""

    def __init__(
        self,
        sides: Sequence[Side],
        token_bytes: np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray,
        seed: int | None,
        most: int | None = None,
    ) -> None:
        """`seed` of the order; None: as they stand, for evaluation, then `most` of them spread over the split. In
        training the first `most` samples are repeated for ever."""
        assert all(len(side.offsets) - 1 == len(labels) == len(groups) for side in sides), "a text for each label"
        self.sides = sides
        self.token_bytes = token_bytes
        self.labels = labels
        self.groups = groups
        self.most = most
        self.order = None if seed is None else TextOrder(len(labels), seed)

    def __len__(self) -> int:
        return len(self.labels) if self.most is None else min(self.most, len(self.labels))

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The examples of these indices; in evaluation empty samples beyond the end."""
        return [self._sample(index) for index in indices]

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """(n, texts) int64 tokens of the texts of these examples, in training."""
        assert self.order is not None
        numbers = np.array([self.order.number(self._repeated(index)) for index in indices])
        return np.stack([side.lengths(numbers) for side in self.sides], 1)

    def _repeated(self, index: int) -> int:
        return index if self.most is None else index % self.most

    def _sample(self, index: int) -> Sample:
        if self.order is not None:
            index = self._repeated(index)
            return self._example(self.order.number(index), index)
        if index >= len(self):
            return Sample(np.empty(0, np.int64), np.empty(0, np.float32), index)
        number = index * len(self.labels) // len(self)
        return self._example(number, number)

    def _example(self, number: int, index: int) -> Sample:
        part = int(self.groups[number])
        first, *more = (side.text(number, self.token_bytes, index, part) for side in self.sides)
        return replace(first, label=self.labels[number], pair=more[0] if more else None)
