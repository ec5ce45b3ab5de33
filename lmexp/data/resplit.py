"""BPE-dropout: texts whose tokens are cut into smaller ones at random, so that a model sees words cut in many ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from lmexp.contracts import Sample
from lmexp.data.mixture import Source

_JUMP = [0, 0, 0, 1]  # far along the stream at whose start the objective's noise of the same sample is


class Resplit:
    """Training samples of whole texts, each token of which is merged anew from its bytes with some merges left out.

    Of the merges that are possible at a time each is left out with probability `dropout`, and the first of the others
    is made, until none is left (BPE-dropout, Provilkov et al. 2020, algorithm 1, but within each token of the usual
    cut: where that ends a token, one ends). A pure function of the seed and the sample's index, so that each epoch has
    other cuts. A sample of which more would be lost for it stays as it was, and so does a token that no merges lead to.
    """

    def __init__(
        self,
        source: Source,
        merges: np.ndarray,
        token_bytes: np.ndarray,
        dropout: float,
        seed: int,
        lost: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """`merges` (n, 3) and `token_bytes` (vocab_size,) are the tokenizer's; `lost` is the objective's
        (`ReadsWholeTexts`), for its block."""
        self.source = source
        self.merges = merges
        self.token_bytes = token_bytes
        self.dropout = dropout
        self.seed = seed
        self.lost = lost
        self._paths: dict[int, list[list[int]]] = {}

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        return [self._resplit(sample) for sample in self.source.samples(indices)]

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """(n, texts) int64 tokens of these samples' texts, as they are cut."""
        return np.array(
            [[len(s.tokens)] if s.pair is None else [len(s.tokens), len(s.pair.tokens)] for s in self.samples(indices)]
        )

    def _resplit(self, sample: Sample) -> Sample:
        key = np.array([self.seed, sample.index], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=_JUMP))
        texts = [sample.tokens] if sample.pair is None else [sample.tokens, sample.pair.tokens]
        cut = [self._cut(text, rng) for text in texts]
        before, after = self.lost(np.array([[len(text) for text in texts], [len(text) for text in cut]]))
        fits = np.broadcast_to(after <= before, len(texts))  # of what is cut off both together, both stay
        first, *more = (new if fit else old for old, new, fit in zip(texts, cut, fits, strict=True))
        pair = sample.pair and replace(sample.pair, tokens=more[0], n_bytes=self.token_bytes[more[0]])
        return replace(sample, tokens=first, n_bytes=self.token_bytes[first], pair=pair)

    def _cut(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Other tokens (m,) for the same text."""
        # merges made before the first is left out; for most tokens these are all
        made = np.floor(np.log1p(-rng.random(len(tokens))) / np.log1p(-self.dropout))
        cut = np.flatnonzero(made < self._steps[tokens]).tolist()
        if not cut:
            return tokens
        draws = _numbers(rng)
        out = tokens.tolist()
        for place in reversed(cut):
            path = self._path(out[place])
            if made[place] < len(path) - 1:
                out[place : place + 1] = self._merged(path[int(made[place])], draws)
        return np.array(out, dtype=tokens.dtype)

    def _merged(self, symbols: list[int], draws: Iterator[float]) -> list[int]:
        """What becomes of the ids once the merge that is their first has been left out."""
        found = self._possible(symbols)
        found.remove(min(found))
        while kept := [merge for merge in found if next(draws) >= self.dropout]:
            symbols = self._made(min(kept), symbols)
            found = self._possible(symbols)
        return symbols

    def _possible(self, symbols: list[int]) -> list[tuple[int, int]]:
        """The merges that these ids allow: rank and place of each."""
        ranks = self._ranks
        return [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]

    def _made(self, merge: tuple[int, int], symbols: list[int]) -> list[int]:
        rank, place = merge
        return [*symbols[:place], self._results[rank], *symbols[place + 2 :]]

    def _path(self, token: int) -> list[list[int]]:
        """From the smallest ids of a token, merge by merge, to itself; itself alone if merges lead elsewhere."""
        if token not in self._paths:
            path = [self._smallest(token)]
            while found := self._possible(path[-1]):
                path.append(self._made(min(found), path[-1]))
            self._paths[token] = path if path[-1] == [token] else [[token]]
        return self._paths[token]

    def _smallest(self, token: int) -> list[int]:
        if token not in self._halves:
            return [token]
        return [small for half in self._halves[token] for small in self._smallest(half)]

    @cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        return {(first, second): rank for rank, (first, second, _) in reversed(list(enumerate(self.merges.tolist())))}

    @cached_property
    def _results(self) -> list[int]:
        return self.merges[:, 2].tolist()

    @cached_property
    def _halves(self) -> dict[int, tuple[int, int]]:
        """Of each merged id; of two ways to it the first."""
        return {whole: (first, second) for first, second, whole in reversed(self.merges.tolist())}

    @cached_property
    def _steps(self) -> np.ndarray:
        """(vocab_size,) merges that make each token."""
        return np.array([len(self._smallest(token)) - 1 for token in range(len(self.token_bytes))])

    def __getstate__(self) -> dict[str, object]:
        made = ("_paths", "_ranks", "_results", "_halves", "_steps")
        return {**{name: value for name, value in self.__dict__.items() if name not in made}, "_paths": {}}


def _numbers(rng: np.random.Generator) -> Iterator[float]:
    """Uniform in [0, 1), without end; one by one from NumPy would take ten times as long."""
    while True:
        yield from rng.random(128).tolist()
