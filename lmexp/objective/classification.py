"""Classification: what a text is, -sum log p(label | text): sentiment, entailment and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch

from lmexp.contracts import IGNORE_INDEX, Batch, Collate, Family, Sample, UserError
from lmexp.objective.rows import first_fit


@dataclass(frozen=True)
class Classification:
    """An encoder reads `<cls> text <eos>`, or `<cls> text <eos> second <eos>` (Devlin et al. 2019, figure 4), where eos
    is BERT's [SEP]; a decoder the same after an eos (Radford et al. 2018, section 3.3); an encoder-decoder the same
    without the first token, on both sides, the decoder one place behind (Lewis et al. 2020, section 4.1). Texts share
    rows, each seeing itself only, so that little is padding."""

    max_length: int | None = None
    """Tokens of a text, or of two together, at most, marks included; the rest is cut, of the longer text first; at
    least 4; null: the block."""

    segments: bool = False
    """Tell first and second text apart by the model's segment embedding, as BERT does."""

    families: ClassVar[tuple[Family, ...]] = ("encoder", "decoder", "encoder_decoder")
    reads_pairs: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = False
    reads_documents: ClassVar[bool] = False
    bits: ClassVar[str | None] = None
    read_texts: ClassVar[tuple[str, ...]] = ("texts",)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 4:
            raise UserError(f"objective.max_length={self.max_length}; expected at least 4 tokens, or null.")

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ("cls",) if family == "encoder" else ()

    def sample_length(self, block_size: int) -> int:
        """Texts come whole."""
        return block_size

    def most(self, block_size: int) -> int:
        """Tokens read of a text, marks included; `UserError` if the block has no room for them."""
        most = self.max_length or block_size
        if most > block_size:
            raise UserError(
                f"objective.max_length={most} is more than data.block_size={block_size}; lower the one or raise the "
                "other."
            )
        return most

    def lost(self, lengths: np.ndarray, block_size: int, family: Family) -> np.ndarray:
        """Of all texts of a sample together."""
        room = self.most(block_size) - marks(family, lengths.shape[1])
        return np.maximum(lengths.sum(1, keepdims=True) - room, 0)

    def read(self, lengths: np.ndarray, block_size: int, family: Family) -> np.ndarray:
        """The texts with their marks, on both sides of an encoder-decoder."""
        once = lengths.sum(1) - self.lost(lengths, block_size, family)[:, 0] + marks(family, lengths.shape[1])
        return once * (2 if family == "encoder_decoder" else 1)

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Collate(self, tokenizer, family, tokenizer.pad_id if start_id is None else start_id)


def marks(family: Family, n_texts: int) -> int:
    """Special tokens that are read beside the texts."""
    return n_texts + (family != "encoder_decoder")


class _Collate:
    def __init__(self, settings: Classification, tokenizer: Any, family: Family, start_id: int) -> None:
        self.settings = settings
        self.eos_id = tokenizer.eos_id
        self.first = {"encoder": [tokenizer.roles.get("cls")], "decoder": [tokenizer.eos_id]}.get(family, [])
        self.family = family
        self.start_id = start_id

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        read = [(self._marked(sample, block_size), sample) for sample in samples if sample.label is not None]
        rows = first_fit([len(tokens) for (tokens, _), _ in read], block_size)
        shape = (max(1, len(rows)), block_size)
        inputs = {name: np.zeros(shape, dtype=np.int64) for name in ("tokens", "positions", "segments")}
        inputs["documents"] = np.full(shape, -1, dtype=np.int64)
        width = (shape[0], max([1, *map(len, rows)]))
        classes = next((sample.label.shape for sample in samples if sample.label is not None), ())
        labels = np.full(width + classes, IGNORE_INDEX, dtype=np.int64)
        places, parts = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row):
                (tokens, second), sample = read[i]
                here = slice(at, at + len(tokens))
                inputs["tokens"][r, here] = tokens
                inputs["positions"][r, here] = np.arange(len(tokens))
                inputs["documents"][r, here] = number
                inputs["segments"][r, at + second : at + len(tokens)] = 1
                labels[r, number] = cast(np.ndarray, sample.label)
                places[r, number], parts[r, number] = sample.index, sample.part
                at += len(tokens)
        if not self.settings.segments:
            del inputs["segments"]
        if self.family == "encoder_decoder":
            inputs |= self._behind(inputs)
        return {
            "inputs": {name: torch.from_numpy(value) for name, value in inputs.items()},
            "labels": torch.from_numpy(labels),
            "n_bytes": torch.zeros(shape[0], dtype=torch.int64),
            "places": torch.from_numpy(places),
            "parts": torch.from_numpy(parts),
        }

    def _marked(self, sample: Sample, block_size: int) -> tuple[np.ndarray, int]:
        """The tokens of a sample with their marks, cut to fit, and where the second text begins, their end if there is
        none."""
        texts = [sample.tokens] if sample.pair is None else [sample.tokens, sample.pair.tokens]
        room = self.settings.most(block_size) - marks(self.family, len(texts))
        if len(texts) == 2:
            second = min(len(texts[1]), max(room - len(texts[0]), room // 2))
            texts = [texts[0][: room - second], texts[1][:second]]
        ended = [np.append(text[:room], self.eos_id) for text in texts]
        tokens = np.concatenate([np.array(self.first, dtype=np.int64), *ended])
        return tokens, len(tokens) - len(ended[1]) if len(ended) == 2 else len(tokens)

    def _behind(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The decoder's inputs: each text one place behind, after the start token."""
        tokens = np.roll(inputs["tokens"], 1, axis=1)
        tokens[inputs["positions"] == 0] = self.start_id
        return {
            "decoder_tokens": tokens,
            "decoder_positions": inputs["positions"].copy(),
            "decoder_documents": inputs["documents"].copy(),
        }
