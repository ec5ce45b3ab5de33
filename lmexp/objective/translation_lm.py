"""Translation language modelling: tell hidden tokens from the text and its translation (Lample & Conneau 2019, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lmexp.contracts import Batch, Collate, Family, Sample, UserError
from lmexp.objective.masked_lm import MaskedLM, Masker
from lmexp.objective.noise import generator
from lmexp.objective.rows import Piece, first_fit, masked_batch


@dataclass(frozen=True)
class TranslationLM(MaskedLM):
    """`<cls> text <sep> translation <sep>`, tokens of both hidden; blocks of one language are masked as by `MaskedLM`.

    Pairs share rows, each seeing itself only, so that little is padding. One that is longer than a block is cut on
    both sides in proportion.
    """

    reset_positions: bool = True
    """The translation's positions begin at 0 again."""

    language_embeddings: bool = True
    """Tell the model which language each token is in; its `n_languages` must suffice."""

    reads_pairs: ClassVar[bool] = True
    reads_documents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cls:
            raise UserError("objective.cls=false: a pair always begins with the token cls; set it to true.")

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ("mask", "cls", "sep")

    def sample_length(self, block_size: int) -> int:
        """One less than the block: the `cls` token has a place."""
        return block_size - 1

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Collate(self, Masker(self, tokenizer), tokenizer.roles["sep"])


class _Collate:
    def __init__(self, settings: TranslationLM, masker: Masker, sep_id: int) -> None:
        self.settings = settings
        self.masker = masker
        self.sep_id = sep_id

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        pieces = [self._piece(sample, block_size, seed) for sample in samples]
        rows = first_fit([len(piece.tokens) for piece in pieces], block_size)
        names = ("languages",) if self.settings.language_embeddings else ()
        most = self.settings.most_scored(self.settings.sample_length(block_size))
        return masked_batch([[pieces[number] for number in row] for row in rows], block_size, most, names)

    def _piece(self, sample: Sample, block_size: int, seed: int) -> Piece:
        rng = generator(seed, sample.index)
        cls = [self.masker.cls_id]
        if sample.pair is None:
            noised, places = self.masker(sample.tokens, rng)
            tokens = np.concatenate((cls, noised)) if len(noised) else noised
            scored, labels, n_bytes = places + 1, sample.tokens[places], float(sample.n_bytes[places].sum())
            languages = np.full(len(tokens), sample.language)
            positions = None
        else:
            a, b = _cut(sample, sample.pair, block_size - 3)
            noised_a, places_a = self.masker(sample.tokens[:a], rng)
            noised_b, places_b = self.masker(sample.pair.tokens[:b], rng)
            tokens = np.concatenate((cls, noised_a, [self.sep_id], noised_b, [self.sep_id]))
            scored = np.concatenate((places_a + 1, places_b + a + 2))
            labels = np.concatenate((sample.tokens[places_a], sample.pair.tokens[places_b]))
            n_bytes = float(sample.n_bytes[places_a].sum() + sample.pair.n_bytes[places_b].sum())
            languages = np.repeat([sample.language, sample.pair.language], [a + 2, b + 1])
            reset = np.concatenate((np.arange(a + 2), np.arange(b + 1)))
            positions = reset if self.settings.reset_positions else None
        columns = {"languages": languages} if self.settings.language_embeddings else {}
        return Piece(tokens, scored, labels, n_bytes, sample.part, None, positions, columns)


def _cut(first: Sample, second: Sample, room: int) -> tuple[int, int]:
    """How many tokens of each side are kept, so that both fit into `room`."""
    a, b = len(first.tokens), len(second.tokens)
    if a + b <= room:
        return a, b
    kept = max(1, min(room - 1, round(room * a / (a + b))))
    return min(a, kept), min(b, room - kept)
