"""Samples cut from a stream of tokens: shuffled blocks to train on, and the split in order to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lmexp.contracts import Sample
from lmexp.data.order import BlockOrder

_AHEAD = 4096  # starts computed at once: the permutation costs as much for one index as for many


class TokenFile:
    """A memory-mapped stream of tokens, opened when first read; sent to a worker as its path only."""

    def __init__(self, path: str | Path, dtype: str, n_tokens: int) -> None:
        """`path` holds `n_tokens` numbers of `dtype` (uint16 or uint32), and nothing else."""
        self.path = Path(path)
        self.dtype = dtype
        self.n_tokens = n_tokens

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) of `dtype`, read from disk where it is touched."""
        return np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,)))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def stride_of(sample_length: int, block_size: int) -> int:
    """Tokens from a sample to the next: where a sample is its inputs and one more label, that token is shared, so
    that each is predicted once."""
    return block_size if sample_length == block_size + 1 else sample_length


def document_ids(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """(..., length) int64: which document of the block each token is in; the token that ends one starts the next."""
    ends = tokens == eos_id
    ends[..., 0] = False
    return ends.cumsum(-1, dtype=np.int64)


class PackedTokens:
    """Training samples: blocks of the stream in the order of `BlockOrder`."""

    def __init__(
        self,
        stream: TokenFile,
        token_bytes: np.ndarray,
        order: BlockOrder,
        mask_eos: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        """`token_bytes` (vocab_size,) is the tokenizer's; `mask_eos` the document end to mask at, None for no mask;
        with `max_samples` the first so many samples are repeated for ever."""
        self.stream = stream
        self.token_bytes = token_bytes
        self.order = order
        self.mask_eos = mask_eos
        self.max_samples = max_samples
        self._columns = np.arange(order.length)
        self._ahead = (0, np.empty(0, dtype=np.int64))

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these global indices."""
        if self.max_samples is not None:
            indices = [i % self.max_samples for i in indices]
        starts = np.array([self._start(i) for i in indices])
        tokens = self.stream.tokens[starts[:, None] + self._columns].astype(np.int64)  # (B, length)
        n_bytes = self.token_bytes[tokens]
        if self.mask_eos is None:
            return [Sample(t, b, i) for t, b, i in zip(tokens, n_bytes, indices, strict=True)]
        documents = document_ids(tokens, self.mask_eos)
        return [Sample(t, b, i, d) for t, b, i, d in zip(tokens, n_bytes, indices, documents, strict=True)]

    def __iter__(self) -> Iterator[Sample]:
        """One epoch."""
        for i in range(self.order.n_blocks):
            yield from self.samples([i])

    def _start(self, index: int) -> int:
        first, starts = self._ahead
        if not first <= index < first + len(starts):
            first = index // _AHEAD * _AHEAD
            starts = self.order.starts(first, _AHEAD)
            self._ahead = (first, starts)
        return int(starts[index - first])


class SequentialTokens:
    """Evaluation samples: the blocks of a split one after the other, each token after the first predicted once.

    The last block is shorter.
    """

    def __init__(
        self,
        stream: TokenFile,
        token_bytes: np.ndarray,
        length: int,
        stride: int,
        mask_eos: int | None = None,
        max_blocks: int | None = None,
    ) -> None:
        """`max_blocks` blocks spread evenly over the split, None for all of it; the others as in `PackedTokens`."""
        self.stream = stream
        self.token_bytes = token_bytes
        self.length = length
        self.stride = stride
        self.mask_eos = mask_eos
        shared = length - stride
        total = max(0, -(-(stream.n_tokens - shared) // stride))
        count = total if max_blocks is None else min(max_blocks, total)
        self.blocks = np.arange(count) * total // max(1, count)
        """(n,) int64, the blocks that are evaluated."""

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at these places of the selection; empty ones beyond its end."""
        out = []
        for i in indices:
            start = int(self.blocks[i]) * self.stride if i < len(self.blocks) else self.stream.n_tokens
            tokens = self.stream.tokens[start : start + self.length].astype(np.int64)
            documents = None
            if self.mask_eos is not None:
                documents = document_ids(tokens, self.mask_eos) if len(tokens) else tokens
            # the block's own number: its noise does not depend on which others are evaluated
            number = int(self.blocks[i]) if i < len(self.blocks) else i
            out.append(Sample(tokens, self.token_bytes[tokens], number, documents))
        return out

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Sample]:
        yield from self.samples(range(len(self.blocks)))


def evaluation_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The places of `count` evaluation samples for each batch of this rank: place k goes to rank k % world_size.

    Ranks that have one less, and the end of the last batch, get places beyond the end, which are empty samples, so
    that every rank has the same number of batches of the same size.
    """
    each = -(-count // world_size)
    size = max(1, min(batch_size, each))
    return [[rank + world_size * k for k in range(at, at + size)] for at in range(0, each, size)]
