"""Any corpus as its parts: one for most, several for a corpus of many languages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lmexp.corpus.parts import Part, PartedCorpus, smoothed_texts
from lmexp.data.labelled import columns, is_labelled


def is_parted(corpus: Any) -> bool:
    """Whether it is made of parts, however many."""
    return hasattr(corpus, "parts")


def parts_of(corpus: Any) -> list[Part]:
    """Its parts; a corpus that has none is one without a name, and each text of labelled ones is a side of it."""
    if is_labelled(corpus):
        texts = columns(corpus)
        return [Part("", ("",) * len(texts), texts)]
    return corpus.parts() if is_parted(corpus) else [Part("", ("",), (corpus,))]


@dataclass(frozen=True)
class SmoothedTexts:
    """The training texts to learn one vocabulary for all parts from, as the `rows` of a corpus."""

    corpus: PartedCorpus

    streaming = False

    def fingerprint(self) -> str:
        return f"{self.corpus.fingerprint()} smoothed by {self.corpus.alpha}"

    def rows(self, split: Any) -> SmoothedTexts:
        return self

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """Batches of rows, as `datasets` gives them."""
        texts = smoothed_texts(self.corpus)
        while batch := list(islice(texts, batch_size)):
            yield {"text": batch}
