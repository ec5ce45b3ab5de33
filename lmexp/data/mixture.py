"""Several sources as one: which one each sample comes from, smoothed and exact, and texts beside their translation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lmexp.contracts import Sample
from lmexp.data.order import keys, permute
from lmexp.data.packing import TokenFile

_ORDER_STREAM = 2  # `BlockOrder` draws from the seed's streams 0 and 1
_PIECE = 128  # samples or pairs ordered at once: more would make a single one slow, fewer all of them
_PIECES = 64  # of texts, that stay at hand: a mixture asks for those of a period in any order
_COUNTED = 65536  # samples counted at once
_LEAST = 3  # samples that the rarest source has in a period


class Source(Protocol):
    """Training samples by their index within one source."""

    def samples(self, indices: Sequence[int]) -> list[Sample]: ...


class TextSource(Source, Protocol):
    """Training samples that are whole texts."""

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """(n, texts) int64: tokens of the texts of these samples."""
        ...


class SizedSource(Source, Protocol):
    """Evaluation samples of one source, by their place; empty ones beyond its end."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class MixtureOrder:
    """Which source sample i is drawn from, and as the how manieth of that source: a pure function of (seed, i).

    Samples are dealt in periods of P. After i periods the sources up to l have got floor(i P C_l) samples together, C
    being the cumulative shares, so that no share is off by more than a sample or two, however many periods there were;
    each period deals its samples in an order of its own.
    """

    shares: tuple[float, ...]
    """Of each source, above 0; they sum to 1."""

    seed: int
    """Of the order within the periods."""

    @property
    def period(self) -> int:
        """Samples that are dealt together, P."""
        return max(1024, int(np.ceil(_LEAST / min(self.shares))))

    def draws(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) sources and (count,) indices within them, of the samples first, first + 1, ..."""
        sources = np.empty(count, dtype=np.int64)
        within = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            period, place = divmod(first + done, self.period)
            here = min(count - done, self.period - place)
            before = self._dealt(period)
            ends = (self._dealt(period + 1) - before).cumsum()
            slots = permute(np.arange(place, place + here), self.period, keys(self.seed, period, _ORDER_STREAM))
            drawn = np.searchsorted(ends, slots, side="right")
            sources[done : done + here] = drawn
            within[done : done + here] = before[drawn] + slots - np.concatenate(([0], ends))[drawn]
            done += here
        return sources, within

    def counts(self, n_samples: int) -> np.ndarray:
        """(sources,) int64: how many of the first `n_samples` come from each."""
        period, place = divmod(n_samples, self.period)
        counts, first = self._dealt(period), period * self.period
        for begin in range(0, place, _COUNTED):
            drawn, _ = self.draws(first + begin, min(_COUNTED, place - begin))
            counts += np.bincount(drawn, minlength=len(self.shares))
        return counts

    def _dealt(self, periods: int) -> np.ndarray:
        """(sources,) int64: samples of each in so many first periods."""
        cumulative = np.cumsum(self.shares[:-1])
        ends = np.floor(periods * self.period * cumulative).astype(np.int64)
        return np.diff(ends, prepend=0, append=periods * self.period)


class Mixed:
    """Training samples of several sources in the order of a `MixtureOrder`."""

    def __init__(self, sources: Sequence[Source], order: MixtureOrder, max_samples: int | None = None) -> None:
        """With `max_samples` the first so many samples are repeated for ever."""
        self.sources = sources
        self.order = order
        self.max_samples = max_samples
        self._ahead: tuple[int, np.ndarray, np.ndarray] = (0, np.empty(0, np.int64), np.empty(0, np.int64))

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these global indices."""
        out = []
        for index in indices:
            index = index if self.max_samples is None else index % self.max_samples
            source, within = self._draw(index)
            (sample,) = self.sources[source].samples([within])
            out.append(replace(sample, index=index))
        return out

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """(n, texts) int64, of sources that are whole texts."""
        return np.concatenate([self._lengths(i if self.max_samples is None else i % self.max_samples) for i in indices])

    def _lengths(self, index: int) -> np.ndarray:
        source, within = self._draw(index)
        return self.sources[source].lengths([within])  # type: ignore[attr-defined]

    def _draw(self, index: int) -> tuple[int, int]:
        first, sources, within = self._ahead
        if not first <= index < first + len(sources):
            first = index // _PIECE * _PIECE
            sources, within = self.order.draws(first, _PIECE)
            self._ahead = (first, sources, within)
        return int(sources[index - first]), int(within[index - first])


class Tagged:
    """The samples of one source, each with the part of the corpus and the language that they are of."""

    def __init__(self, source: Source, part: int, language: int) -> None:
        self.source = source
        self.part = part
        self.language = language

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        return [replace(s, part=self.part, language=self.language) for s in self.source.samples(indices)]

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Side:
    """One language of a text and its translation."""

    stream: TokenFile
    """The tokens of all texts, each followed by a document end."""

    offsets: np.ndarray
    """(texts + 1,) where each text begins."""

    language: int
    """Which of the corpus's languages."""

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) int64 tokens of these texts, without their ends."""
        return (self.offsets[numbers + 1] - self.offsets[numbers] - 1).astype(np.int64)

    def text(self, number: int, token_bytes: np.ndarray, index: int, part: int, pair: Sample | None = None) -> Sample:
        """Text `number`, without its end."""
        tokens = self.stream.tokens[self.offsets[number] : self.offsets[number + 1] - 1].astype(np.int64)
        return Sample(tokens, token_bytes[tokens], index, part=part, language=self.language, pair=pair)


class TextOrder:
    """An order of n texts for each epoch: a pure function of the seed and the sample's index."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._pieces: dict[int, np.ndarray] = {}  # of the order, by their numbers, the oldest first

    def number(self, index: int) -> int:
        """The number of the text that sample `index` is."""
        piece, place = divmod(index, _PIECE)
        if piece not in self._pieces:
            if len(self._pieces) == _PIECES:
                del self._pieces[next(iter(self._pieces))]
            self._pieces[piece] = self._ordered(piece)
        return int(self._pieces[piece][place])

    def _ordered(self, piece: int) -> np.ndarray:
        wanted = np.arange(piece * _PIECE, (piece + 1) * _PIECE)
        numbers = np.empty_like(wanted)
        for epoch in np.unique(wanted // self.count):
            here = wanted // self.count == epoch
            numbers[here] = permute(wanted[here] % self.count, self.count, keys(self.seed, int(epoch), 0))
        return numbers


class Pairs:
    """Texts beside their translations: all of them once in each epoch, in an order of its own."""

    def __init__(self, sides: tuple[Side, Side], token_bytes: np.ndarray, part: int, seed: int | None) -> None:
        """`seed` of the order; None: as they stand, for evaluation."""
        assert len(sides[0].offsets) == len(sides[1].offsets), "the sides have different numbers of texts"
        self.sides = sides
        self.token_bytes = token_bytes
        self.part = part
        self.order = None if seed is None else TextOrder(len(self), seed)

    def __len__(self) -> int:
        return len(self.sides[0].offsets) - 1

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """(n, 2) int64 tokens of both texts of these pairs, in training."""
        assert self.order is not None
        numbers = np.array([self.order.number(index) for index in indices])
        return np.stack([side.lengths(numbers) for side in self.sides], 1)

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The pairs of these indices; in evaluation empty samples beyond the end."""
        out = []
        for index in indices:
            if self.order is None and index >= len(self):
                out.append(Sample(np.empty(0, np.int64), np.empty(0, np.float32), index, part=self.part))
                continue
            number = index if self.order is None else self.order.number(index)
            first, second = self.sides
            pair = second.text(number, self.token_bytes, index, self.part)
            out.append(first.text(number, self.token_bytes, index, self.part, pair))
        return out


class InTurn:
    """Evaluation samples of several sources, one source after the other; empty ones beyond the end."""

    def __init__(self, sources: Sequence[SizedSource], max_samples: int | None = None) -> None:
        """`max_samples` spread evenly over each source; None: all."""
        self.sources = sources
        self.places: list[tuple[int, int]] = []
        for number, source in enumerate(sources):
            count = len(source) if max_samples is None else min(max_samples, len(source))
            self.places += [(number, i * len(source) // max(1, count)) for i in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at these places, each with its index in its source, whatever was left out."""
        out = []
        for index in indices:
            number, within = self.places[index] if index < len(self.places) else (0, len(self.sources[0]))
            (sample,) = self.sources[number].samples([within])
            out.append(sample)
        return out
