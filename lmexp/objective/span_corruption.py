"""Span corruption: write dropped spans, each after the sentinel that stands for it (Raffel et al. 2020, 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from lmexp.contracts import Batch, Collate, Family, Sample, UserError
from lmexp.objective.noise import composition, generator
from lmexp.objective.rows import sequence_batch


@dataclass(frozen=True)
class SpanCorruption:
    """The encoder reads the text with a sentinel for each dropped span; the decoder writes sentinels and spans.

    How much is dropped depends on the length only, so that all blocks give sources and targets of the same lengths.
    """

    rate: float = 0.15
    """Share of the tokens that is dropped, in (0, 1)."""

    mean_span: float = 3.0
    """Tokens of a span on average, at least 1."""

    sentinels: int = 100
    """Sentinel tokens of the vocabulary; as many as a block has spans suffice."""

    families: ClassVar[tuple[Family, ...]] = ("encoder_decoder",)
    reads_pairs: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True
    reads_documents: ClassVar[bool] = False
    bits: ClassVar[str | None] = "infilling_bits_per_byte"
    """Of the dropped text given the rest, the placing of its sentinels included: no probability of a text."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"objective.rate={self.rate}; expected a share above 0 and below 1, such as 0.15.")
        if self.mean_span < 1:
            raise UserError(f"objective.mean_span={self.mean_span}; expected at least 1 token, such as 3.")
        if self.sentinels < 1:
            raise UserError(f"objective.sentinels={self.sentinels}; expected at least 1, such as 100.")

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return tuple(f"sentinel_{i}" for i in range(self.sentinels))

    def dropped(self, length: int) -> tuple[int, int]:
        """(tokens, spans) that are dropped of a text of so many tokens, at least 2."""
        tokens = min(max(round(length * self.rate), 1), length - 1)
        spans = max(1, round(tokens / self.mean_span))
        return tokens, min(spans, tokens, length - tokens)

    def lengths(self, length: int) -> tuple[int, int]:
        """(source, target) lengths for a text of so many tokens, each with its end."""
        tokens, spans = self.dropped(length)
        return length - tokens + spans + 1, tokens + spans + 1

    def sample_length(self, block_size: int) -> int:
        """The most tokens whose source fits into the block, and whose target does."""
        length = 2
        if max(self.lengths(length)) > block_size:
            raise UserError(
                f"data.block_size={block_size}; expected at least {max(self.lengths(length))} for span corruption."
            )
        while max(self.lengths(length + 1)) <= block_size:
            length += 1
        if self.dropped(length)[1] > self.sentinels:
            raise UserError(
                f"objective.sentinels={self.sentinels}: blocks of data.block_size={block_size} have "
                f"{self.dropped(length)[1]} spans; set objective.sentinels to that, or a longer objective.mean_span."
            )
        return length

    def spans(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(length,) bool: which tokens are dropped. Kept and dropped spans take turns, beginning with a kept one, all
        lists of span lengths equally likely (`random_spans_noise_mask` of the released code)."""
        tokens, spans = self.dropped(length)
        lengths = np.empty(2 * spans, dtype=np.int64)
        lengths[1::2] = composition(tokens, spans, rng)
        lengths[::2] = composition(length - tokens, spans, rng)
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Collate(self, tokenizer, start_id)


class _Collate:
    def __init__(self, settings: SpanCorruption, tokenizer: Any, start_id: int | None) -> None:
        self.settings = settings
        self.sentinels = np.array([tokenizer.roles[f"sentinel_{i}"] for i in range(settings.sentinels)])
        self.eos = np.array([tokenizer.eos_id])
        self.start_id = tokenizer.pad_id if start_id is None else start_id
        # the same for all batches
        self._lengths = cache(lambda block_size: settings.lengths(settings.sample_length(block_size)))

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        pairs = [self.corrupted(sample, seed) for sample in samples]
        source, target = self._lengths(block_size)
        sources, targets, n_bytes = zip(*pairs, strict=True)
        return sequence_batch(sources, targets, n_bytes, [s.part for s in samples], self.start_id, source, target)

    def corrupted(self, sample: Sample, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
        """(source, target, bytes of the dropped text); nothing for a text of one token, of which none can be kept."""
        tokens = sample.tokens
        if len(tokens) < 2:
            return tokens[:0], tokens[:0], 0.0
        drop = self.settings.spans(len(tokens), generator(seed, sample.index))
        first = drop & ~np.concatenate(([False], drop[:-1]))
        number = first.cumsum() - 1  # of the span that each dropped token is in
        source = np.where(first, self.sentinels[number], tokens)[~drop | first]
        target = np.insert(tokens[drop], np.flatnonzero(first[drop]), self.sentinels[: first.sum()])
        return np.append(source, self.eos), np.append(target, self.eos), float(sample.n_bytes[drop].sum())
