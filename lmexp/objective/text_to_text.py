"""Text to text: read one text, write another, -sum log p(target | source): translation, summarization and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lmexp.contracts import Batch, Collate, Family, Sample, UserError
from lmexp.objective.rows import Pair, Piece, first_fit, masked_batch, paired_batch


@dataclass(frozen=True)
class TextToText:
    """An encoder-decoder reads the source and writes the target; a decoder reads `<eos> source <sep>` and goes on with
    the target, of which alone the loss is. Pairs share rows, each seeing itself only, so that little is padding."""

    max_source: int | None = None
    """Tokens of the source at most, the rest is cut; null: the block, of a decoder half of it."""

    max_target: int | None = None
    """Tokens of the target at most, with its end; null: the block, of a decoder what the source leaves."""

    score_source: bool = False
    """Of a decoder: the source's tokens are scored too, as in pretraining, which few pairs alone make up for badly."""

    families: ClassVar[tuple[Family, ...]] = ("encoder_decoder", "decoder")
    reads_pairs: ClassVar[bool] = True
    reads_texts: ClassVar[bool] = False
    reads_documents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("max_source", "max_target"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"objective.{name}={value}; expected at least 2 tokens, or null.")

    @property
    def bits(self) -> str:
        """Of the target given the source, or of both."""
        return "bits_per_byte" if self.score_source else "target_bits_per_byte"

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ("sep",) if family == "decoder" else ()

    def sample_length(self, block_size: int) -> int:
        """Pairs come whole."""
        return block_size

    def lengths(self, block_size: int, family: Family) -> tuple[int, int]:
        """The most tokens of a source, its marks included, and of a target; `UserError` if the block has no room."""
        decoder = family == "decoder"
        source = self.max_source or (block_size // 2 if decoder else block_size)
        target = self.max_target or (block_size - source if decoder else block_size)
        needed = source + target if decoder else max(source, target)
        if needed > block_size or target < 2 or source < (3 if decoder else 2):  # its marks and a token
            raise UserError(
                f"data.block_size={block_size} has no room for objective.max_source={source} and max_target={target} "
                f"tokens{' beside one another' if decoder else ''}; set data.block_size={max(needed, 4)}."
            )
        return source, target

    read_texts: ClassVar[tuple[str, ...]] = ("source", "target")

    def lost(self, lengths: np.ndarray, block_size: int, family: Family) -> np.ndarray:
        """Of the source and of the target, which need room for their marks too."""
        source, target = self.lengths(block_size, family)
        room = np.array([source - (2 if family == "decoder" else 1), target - 1])
        return np.maximum(lengths - room, 0)

    def read(self, lengths: np.ndarray, block_size: int, family: Family) -> np.ndarray:
        """A mark on either side, or two of a decoder's."""
        return lengths.sum(1) - self.lost(lengths, block_size, family).sum(1) + 2

    def prompt(self, source: np.ndarray, tokenizer: Any, family: Family, block_size: int) -> np.ndarray:
        """What the model reads of a source (n,) before it writes, cut to fit."""
        most, _ = self.lengths(block_size, family)
        if family == "decoder":
            return np.concatenate(([tokenizer.eos_id], source[: most - 2], [tokenizer.roles["sep"]]))
        return np.append(source[: most - 1], tokenizer.eos_id)

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Collate(self, tokenizer, family, tokenizer.pad_id if start_id is None else start_id)


class _Collate:
    def __init__(self, settings: TextToText, tokenizer: Any, family: Family, start_id: int) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.family = family
        self.start_id = start_id

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        pairs = [self._pair(sample, block_size) for sample in samples if sample.pair is not None]
        if self.family == "encoder_decoder":
            # a row has room for one longest target: with more, the decoder's side would be mostly padding
            most = self.settings.lengths(block_size, self.family)[1]
            rows = first_fit([(len(pair.source), len(pair.target)) for pair in pairs], block_size, most)
            return paired_batch([[pairs[i] for i in row] for row in rows], block_size, self.start_id)
        pieces = [_piece(pair, self.settings.score_source) for pair in pairs]
        rows = first_fit([len(piece.tokens) for piece in pieces], block_size)
        return masked_batch([[pieces[i] for i in row] for row in rows], block_size, block_size)

    def _pair(self, sample: Sample, block_size: int) -> Pair:
        assert sample.pair is not None
        most = self.settings.lengths(block_size, self.family)[1] - 1
        target = sample.pair.tokens[:most]
        source = self.settings.prompt(sample.tokens, self.tokenizer, self.family, block_size)
        n_bytes = float(sample.pair.n_bytes[:most].sum())
        if self.settings.score_source:
            n_bytes += float(sample.n_bytes[: len(source) - 2].sum())
        return Pair(source, np.append(target, self.tokenizer.eos_id), n_bytes, sample.part)


def _piece(pair: Pair, score_source: bool) -> Piece:
    """Both in one text: each token of the target, or of both, is told at the place before it."""
    tokens = np.concatenate((pair.source, pair.target[:-1]))
    places = np.arange(0 if score_source else len(pair.source) - 1, len(tokens))
    return Piece(tokens, places, np.append(tokens, pair.target[-1])[places + 1], pair.n_bytes, pair.part)
