"""The order of training blocks: a pseudo-random permutation without a table, new in every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 8
_FEW = 16
"""Items up to which numpy takes longer than Python itself."""

_WORD = (1 << 64) - 1


def keys(*seeds: int) -> np.ndarray:
    """(rounds,) uint64 round keys: a pure function of the integers given, each in [0, 2^63)."""
    return np.random.SeedSequence(seeds).generate_state(_ROUNDS, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits (splitmix64's finalizer, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(x: int) -> int:
    """The same of one number."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def permute(items: np.ndarray, n: int, round_keys: np.ndarray) -> np.ndarray:
    """Where each of `items`, ints in [0, n), goes in a pseudo-random permutation of n; the same shape, int64.

    A Feistel network over the next power of two, walked until it lands below n (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"): fewer than two walks on average, and no memory for the permutation.
    """
    bits = max(2, (n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    out = items.astype(np.uint64)
    todo = np.arange(out.size)
    flat = out.reshape(-1)
    while todo.size > _FEW:
        x = flat[todo]
        high, low = x >> low_bits, x & low_mask
        for number, key in enumerate(round_keys):
            if number % 2:
                low = low ^ (_mix(high + key) & low_mask)
            else:
                high = high ^ (_mix(low + key) & high_mask)
        x = high << low_bits | low
        flat[todo] = x
        todo = todo[x >= np.uint64(n)]
    few_keys = round_keys.tolist()
    for place in todo.tolist():
        flat[place] = _permute_one(int(flat[place]), n, few_keys)
    return out.astype(np.int64)


def _permute_one(x: int, n: int, round_keys: list[int]) -> int:
    """The same of one item."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        high, low = x >> low_bits, x & low_mask
        for number, key in enumerate(round_keys):
            if number % 2:
                low ^= _mix_one((high + key) & _WORD) & low_mask
            else:
                high ^= _mix_one((low + key) & _WORD) & high_mask
        x = high << low_bits | low
        if x < n:
            return x


@dataclass(frozen=True)
class BlockOrder:
    """Which tokens of a stream each training sample is, as a pure function of (seed, sample index).

    Sample i belongs to epoch i // n_blocks and is a block of the stream that no other sample of the epoch is. The
    grid of blocks starts at another offset in each epoch, so that epochs differ in more than their order.
    """

    n_tokens: int
    """Tokens in the stream."""

    length: int
    """Tokens in a sample."""

    stride: int
    """Tokens from the start of a block to that of the next; `length - 1` where neighbours share a token."""

    seed: int
    """Of the order; at least 0."""

    @property
    def n_blocks(self) -> int:
        """Blocks in an epoch, whatever its offset; 0 if the stream is shorter than a sample."""
        if self.n_tokens < self.length:
            return 0
        return max(1, (self.n_tokens - self.length) // self.stride)

    def starts(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: where in the stream the samples first, first + 1, ... begin."""
        n = self.n_blocks
        assert n > 0, "the stream is shorter than a block"
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(first + done, n)
            here = min(count - done, n - place)
            blocks = permute(np.arange(place, place + here), n, keys(self.seed, epoch, 0))
            out[done : done + here] = blocks * self.stride + self._offset(epoch)
            done += here
        return out

    def _offset(self, epoch: int) -> int:
        """Where the epoch's first block begins, uniform over all places that leave room for the last."""
        choices = min(self.stride, self.n_tokens - self.length - (self.n_blocks - 1) * self.stride + 1)
        return int(keys(self.seed, epoch, 1)[0] % np.uint64(choices))
