"""Prefix language modelling: read the first part of a text both ways, write the rest (Raffel et al. 2020, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lmexp.contracts import IGNORE_INDEX, Batch, Collate, Family, Sample
from lmexp.objective.causal_lm import CausalLM
from lmexp.objective.noise import generator
from lmexp.objective.rows import rounded_up, sequence_batch


@dataclass(frozen=True)
class PrefixLM:
    """Where the first part ends is drawn for each sample, every place equally likely. A decoder sees all of the first
    part from each place of it; an encoder-decoder reads it with the encoder."""

    families: ClassVar[tuple[Family, ...]] = ("decoder", "encoder_decoder")
    reads_pairs: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True
    reads_documents: ClassVar[bool] = False
    bits: ClassVar[str | None] = "continuation_bits_per_byte"
    """Of the rest given the first part."""

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ()

    def sample_length(self, block_size: int) -> int:
        """One more than the block: the last label."""
        return block_size + 1

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        if family == "decoder":
            return _Decoder(tokenizer)
        return _EncoderDecoder(tokenizer.pad_id if start_id is None else start_id)


def split_at(sample: Sample, seed: int) -> int:
    """Tokens of the first part: from 1 to all but one; 0 for a text of fewer than two, of which nothing is scored."""
    n = len(sample.tokens)
    return int(generator(seed, sample.index).integers(1, n)) if n > 1 else 0


class _Decoder:
    def __init__(self, tokenizer: Any) -> None:
        self._causal = CausalLM().collate(tokenizer, "decoder")

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        batch = self._causal(samples, block_size, seed)
        prefix = [split_at(sample, seed) for sample in samples]
        batch["labels"] = batch["labels"].clone()  # it may be a view of the memory that the inputs stand in
        for row, n in enumerate(prefix):
            batch["labels"][row, : max(0, n - 1)] = IGNORE_INDEX
        n_bytes = [float(sample.n_bytes[n:].sum()) if n else 0.0 for sample, n in zip(samples, prefix, strict=True)]
        batch["n_bytes"] = torch.from_numpy(np.array(n_bytes).round().astype(np.int64))
        batch["inputs"]["prefix"] = torch.tensor(prefix, dtype=torch.int64)
        return batch


class _EncoderDecoder:
    def __init__(self, start_id: int) -> None:
        self.start_id = start_id

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        prefix = [split_at(sample, seed) for sample in samples]
        sources = [sample.tokens[:n] for sample, n in zip(samples, prefix, strict=True)]
        targets = [sample.tokens[n:] if n else sample.tokens[:0] for sample, n in zip(samples, prefix, strict=True)]
        n_bytes = [float(sample.n_bytes[n:].sum()) if n else 0.0 for sample, n in zip(samples, prefix, strict=True)]
        source = rounded_up(max(len(text) for text in sources), block_size)
        target = rounded_up(max(len(text) for text in targets), block_size)
        parts = [sample.part for sample in samples]
        return sequence_batch(sources, targets, n_bytes, parts, self.start_id, source, target)
