"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmexp.contracts import IGNORE_INDEX, Batch, Sample


@dataclass(frozen=True)
class CausalLM:
    """Inputs are tokens 0..T-1 of a sample, labels tokens 1..T; loss -sum_t log p(x_t | x_<t)."""

    def sample_length(self, block_size: int) -> int:
        """Tokens of the stream that a sample of `block_size` inputs needs: one more, the last label."""
        return block_size + 1

    def collate(self, samples: Sequence[Sample], block_size: int) -> Batch:
        """Stack samples to a batch (B, block_size); shorter samples are padded with token 0 and not scored."""
        length = block_size + 1
        if all(len(sample.tokens) == length for sample in samples):
            tokens = np.stack([sample.tokens for sample in samples])
            labels = tokens[:, 1:]
            n_bytes = np.stack([sample.n_bytes for sample in samples])[:, 1:].sum(1)
        else:
            tokens = np.zeros((len(samples), length), dtype=np.int64)
            labels = np.full((len(samples), block_size), IGNORE_INDEX, dtype=np.int64)
            n_bytes = np.zeros(len(samples))
            for row, sample in enumerate(samples):
                n = len(sample.tokens)
                tokens[row, :n] = sample.tokens
                labels[row, : max(0, n - 1)] = sample.tokens[1:]
                n_bytes[row] = sample.n_bytes[1:].sum()
        inputs = {"tokens": torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))}
        if any(sample.documents is not None for sample in samples):
            documents, positions = _documents(samples, block_size)
            inputs |= {"documents": documents, "positions": positions}
        return {
            "inputs": inputs,
            "labels": torch.from_numpy(np.ascontiguousarray(labels)),
            "n_bytes": torch.from_numpy(n_bytes.astype(np.int64)),
        }


def _documents(samples: Sequence[Sample], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which document each input belongs to, and its position within it, both (B, block_size) int64.

    Padding is a document of its own (-1), so that no real token attends to it or the other way round.
    """
    documents = np.full((len(samples), block_size), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        if sample.documents is not None:
            n = min(len(sample.documents), block_size)
            documents[row, :n] = sample.documents[:n]
    columns = np.broadcast_to(np.arange(block_size), documents.shape)
    first = np.zeros_like(documents)
    starts = documents[:, 1:] != documents[:, :-1]
    first[:, 1:] = np.where(starts, columns[:, 1:], 0)
    positions = columns - np.maximum.accumulate(first, axis=1)
    return torch.from_numpy(documents), torch.from_numpy(positions)
