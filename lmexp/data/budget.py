"""Batches of as many whole texts as fit into a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_PIECE = 128  # samples looked at together
_KEPT = 64  # sizes remembered: a batch's is asked for by the loader, and again when it is trained on


class TokenBudget:
    """How many samples the batch has that begins at a given one: as many as have at most `tokens` together.

    Batches take the samples in the order that they have, so that a size is a function of the first sample alone, and
    resuming is moving the cursor. Texts of like length are not brought together: those of a batch share rows, where
    short ones fill what long ones leave.
    """

    def __init__(self, lengths: Callable[[Sequence[int]], np.ndarray], tokens: int) -> None:
        """`lengths` gives the tokens (n,) of samples by their indices; none has more than `tokens`."""
        self.lengths = lengths
        self.tokens = tokens
        self._sizes: dict[int, int] = {}

    def size(self, first: int) -> int:
        """Samples in the batch that begins with sample `first`; at least 1."""
        if first not in self._sizes:
            if len(self._sizes) == _KEPT:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[first] = self._count(first)
        return self._sizes[first]

    def _count(self, first: int) -> int:
        used = count = 0
        while True:
            ends = used + self.lengths(range(first + count, first + count + _PIECE)).cumsum()
            here = int(np.searchsorted(ends, self.tokens, side="right"))
            count += here
            if here < _PIECE:
                return count
            used = int(ends[-1])
