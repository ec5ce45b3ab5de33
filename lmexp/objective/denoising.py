"""Denoising: the whole text is written from one that was infilled and permuted (Lewis et al. 2020, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lmexp.contracts import Batch, Collate, Family, Sample, UserError
from lmexp.objective.noise import generator, sentence_ends
from lmexp.objective.rows import rounded_up, sequence_batch


@dataclass(frozen=True)
class Denoising:
    """Sentences are shuffled, spans replaced by one mask token each, empty ones too; the decoder writes the text.

    Each document of a block is noised by itself; its end stays where it is.
    """

    rate: float = 0.3
    """Share of the tokens inside spans, in [0, 1), rounded to whole tokens of each document."""

    mean_span: float = 3.0
    """Tokens of a span on average (Poisson distributed), above 0."""

    permute: bool = True
    """Put the sentences in another order."""

    families: ClassVar[tuple[Family, ...]] = ("encoder_decoder",)
    reads_pairs: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True
    reads_documents: ClassVar[bool] = False
    bits: ClassVar[str | None] = "conditional_bits_per_byte"
    """Of the text given its noised form: no probability of a text."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"objective.rate={self.rate}; expected a share of at least 0 and below 1, such as 0.3.")
        if self.mean_span <= 0:
            raise UserError(f"objective.mean_span={self.mean_span}; expected a number above 0, such as 3.")

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ("mask",)

    def sample_length(self, block_size: int) -> int:
        """One less than the block: both texts have an end."""
        return block_size - 1

    def span_lengths(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(k,) lengths that sum to the share of `length`: Poisson numbers, the last one cut; never more spans than
        the tokens they hide, so that the noised text is no longer than the text."""
        budget = round(self.rate * length)
        if not budget:
            return np.empty(0, dtype=np.int64)
        drawn = rng.poisson(self.mean_span, size=budget)
        total = drawn.cumsum()
        last = int(np.searchsorted(total, budget))
        if last >= budget:  # so many empty spans that they do not suffice
            return np.append(drawn[: budget - 1], budget - (total[budget - 2] if budget > 1 else 0))
        drawn[last] -= total[last] - budget
        return drawn[: last + 1]

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Collate(self, tokenizer, start_id)


class _Collate:
    def __init__(self, settings: Denoising, tokenizer: Any, start_id: int | None) -> None:
        self.settings = settings
        self.mask_id = tokenizer.roles["mask"]
        self.eos = np.array([tokenizer.eos_id])
        self.start_id = tokenizer.pad_id if start_id is None else start_id
        self.special = np.asarray(tokenizer.token_bytes) == 0
        self.ends = sentence_ends(tokenizer)

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        sources = [self.noised(sample, seed) for sample in samples]
        targets = [np.append(sample.tokens, self.eos) if len(sample.tokens) else sample.tokens for sample in samples]
        width = rounded_up(max(len(source) for source in sources), block_size)
        n_bytes = [float(sample.n_bytes.sum()) for sample in samples]
        parts = [sample.part for sample in samples]
        return sequence_batch(sources, targets, n_bytes, parts, self.start_id, width, block_size)

    def noised(self, sample: Sample, seed: int) -> np.ndarray:
        """What the encoder reads, with an end; nothing for nothing."""
        tokens = sample.tokens
        if not len(tokens):
            return tokens
        rng = generator(seed, sample.index)
        if self.settings.permute:
            tokens = self.permuted(tokens, rng)
        pieces = []
        at = 0
        for special in [*np.flatnonzero(self.special[tokens]).tolist(), len(tokens)]:
            if at < special:
                pieces.append(self.infilled(tokens[at:special], rng))
            pieces.append(tokens[special : special + 1])
            at = special + 1
        return np.concatenate((*pieces, self.eos))

    def permuted(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The sentences of each document in another order; what is left at its end counts as one."""
        special = self.special[tokens]
        ends = self.ends[tokens] | special
        sentence = ends.cumsum() - ends
        place = special.cumsum() + np.where(special, 0.0, rng.random(sentence[-1] + 1)[sentence])
        return tokens[place.argsort(kind="stable")]

    def infilled(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Each span replaced by one mask. Spans stand in different gaps between the tokens that are kept, all
        placements equally likely, so that two of them never touch."""
        lengths = self.settings.span_lengths(len(tokens), rng)
        kept = len(tokens) - int(lengths.sum())
        if len(lengths) > kept + 1:  # so few tokens are kept that not every span has a gap of its own
            lengths = np.append(lengths[:kept], lengths[kept:].sum())
        gaps = np.sort(rng.choice(kept + 1, len(lengths), replace=False))  # kept tokens before each span
        starts = gaps + np.concatenate(([0], lengths.cumsum()))[: len(lengths)]
        inside = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(inside, starts, 1)
        np.add.at(inside, starts + lengths, -1)
        hidden = inside.cumsum()[:-1] > 0
        return np.insert(tokens[~hidden], gaps, self.mask_id)
