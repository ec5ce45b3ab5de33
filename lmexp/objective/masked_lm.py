"""Masked language modelling: tell hidden tokens from what stands on both sides (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lmexp.contracts import Batch, Collate, Family, Sample, UserError
from lmexp.objective.noise import generator, ordinary, word_edges
from lmexp.objective.rows import Piece, masked_batch


@dataclass(frozen=True)
class MaskedLM:
    """Some of the tokens are scored; most of these are hidden, some replaced, some left as they are.

    Anew each time a text is read (dynamic masking, Liu et al. 2019, section 4.1). Special tokens are never masked.
    """

    rate: float = 0.15
    """Share of a text's tokens that is scored, in (0, 1); rounded to whole tokens of each sample, at least one."""

    mask_share: float = 0.8
    """Share of the scored ones that the mask token stands for."""

    random_share: float = 0.1
    """Share of them replaced by another token, any of the vocabulary; the rest stays."""

    whole_word: bool = False
    """Score words whole, as many as fit into the share; one that is longer by itself is cut (released with BERT in May
    2019)."""

    cls: bool = True
    """A token of its own begins each block; a classifier can read it."""

    families: ClassVar[tuple[Family, ...]] = ("encoder",)
    reads_pairs: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True
    reads_documents: ClassVar[bool] = True
    bits: ClassVar[str | None] = "pseudo_bits_per_byte"
    """Of hidden tokens given all others: no probability of a text (pseudo-likelihood, Salazar et al. 2020)."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"objective.rate={self.rate}; expected a share above 0 and below 1, such as 0.15.")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise UserError(
                f"objective.mask_share={self.mask_share} and objective.random_share={self.random_share}; expected "
                "shares that sum to at most 1, such as 0.8 and 0.1."
            )

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ("mask", "cls") if self.cls else ("mask",)

    def sample_length(self, block_size: int) -> int:
        """One less than the block where the `cls` token has its place."""
        return block_size - self.cls

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Collate(self, Masker(self, tokenizer))

    def most_scored(self, length: int) -> int:
        """Tokens scored of a text so long."""
        return max(1, round(self.rate * length))


class Masker:
    """Hides tokens of a text."""

    def __init__(self, settings: MaskedLM, tokenizer: Any) -> None:
        self.settings = settings
        self.mask_id = tokenizer.roles["mask"]
        self.cls_id = tokenizer.roles.get("cls")
        self.token_bytes = np.asarray(tokenizer.token_bytes)
        self.ordinary = ordinary(tokenizer)
        self.edges = word_edges(tokenizer) if settings.whole_word else None

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (n,) with some hidden, and the places (k,) of those that are scored, in order."""
        able = np.flatnonzero(self.token_bytes[tokens] > 0)
        if not len(able):
            return tokens, able
        count = max(1, round(self.settings.rate * len(able)))
        if self.edges is None:
            places = np.sort(rng.choice(able, count, replace=False))
        else:
            places = self._words(tokens, able, count, rng)
        fate = rng.random(len(places))
        others = self.ordinary[rng.integers(len(self.ordinary), size=len(places))]
        s = self.settings
        noised = tokens.copy()
        kept = np.where(fate < s.mask_share + s.random_share, others, tokens[places])
        noised[places] = np.where(fate < s.mask_share, self.mask_id, kept)
        return noised, places

    def _words(self, tokens: np.ndarray, able: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """The places of whole words in random order, each as long as there is room for it; if none fits, the
        beginning of the shortest."""
        assert self.edges is not None
        begins, ends = self.edges
        goes_on = begins[tokens[able[1:]]] & ends[tokens[able[:-1]]] & (np.diff(able) == 1)
        word = np.concatenate(([0], (~goes_on).cumsum()))
        sizes = np.bincount(word)
        chosen: list[int] = []
        room = count
        for number in rng.permutation(len(sizes)):
            if sizes[number] <= room:
                chosen.append(number)
                room -= sizes[number]
                if not room:
                    break
        chosen = chosen or [int(sizes.argmin())]
        return able[np.isin(word, chosen)][:count]


class _Collate:
    def __init__(self, settings: MaskedLM, masker: Masker) -> None:
        self.settings = settings
        self.masker = masker

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        rows = [[self.piece(sample, seed)] for sample in samples]
        return masked_batch(rows, block_size, self.settings.most_scored(self.settings.sample_length(block_size)))

    def piece(self, sample: Sample, seed: int) -> Piece:
        """A block, masked."""
        noised, places = self.masker(sample.tokens, generator(seed, sample.index))
        documents, positions = sample.documents, None
        first = 0
        if self.settings.cls and len(noised):
            first = 1
            noised = np.concatenate(([self.masker.cls_id], noised))
            documents = None if documents is None else np.concatenate(([0], documents))
        if documents is not None and len(documents):
            starts = np.flatnonzero(np.diff(documents, prepend=-1))
            positions = np.arange(len(documents)) - np.repeat(starts, np.diff(starts, append=len(documents)))
        labels = sample.tokens[places]
        n_bytes = float(sample.n_bytes[places].sum())
        return Piece(noised, places + first, labels, n_bytes, sample.part, documents, positions)
