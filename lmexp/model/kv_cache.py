"""What attention may see, and the keys and values that it has seen before.

Shapes: B rows, T new positions, S positions or columns with the cached ones, K key-value heads, E numbers a head,
D model width. With a cache B = G * R: G texts with R rows each, which go on from that text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far, for generation; made by a model's `new_cache`.

    Rows that go on from the same text, as those of a beam search do, share its cache: what each of them writes stands
    in a column of its own, and each sees those of its own past. So a `select` moves keys and values only where texts
    leave, and what rows have in common is kept, and read, once. Columns that no row of their text sees any more are
    left behind now and then.
    """

    def __init__(
        self, n_layers: int, batch: int, n_heads: int, length: int, d_head: int, device: Any, dtype: torch.dtype
    ) -> None:
        """Room for `length` positions of `batch` sequences."""
        self._hold(torch.empty(2, n_layers, batch, n_heads, length, d_head, device=device, dtype=dtype))
        self.documents: Tensor | None = None
        """Of the positions, (B, S), where they were given and rows have no columns of their own yet."""
        self.length = 0
        """Positions of each row."""
        self.places: Tensor | None = None
        """The position of each column, (G, at least S), once rows have columns of their own (`begin_columns`,
        `select`); None: positions are columns."""
        self._columns = 0
        self._most = 0  # columns, before some are left behind
        self._seen: Tensor  # (G, R, at least S), 0 or minus infinity: what is added to a row's scores
        self._own: Tensor  # (R, R) of new columns

    def _hold(self, held: Tensor) -> None:
        self._held, self._layers = held, [held[:, layer] for layer in range(held.shape[1])]

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self._held.dtype

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new positions, (G, K, R * T, E), see `by_text`; returns all of the layer's,
        (G, K, S, E)."""
        new, seen = self._room(layer, keys.shape[2])
        new[0].copy_(keys)
        new[1].copy_(values)
        return seen

    def append_both(self, layer: int, both: Tensor) -> tuple[Tensor, Tensor]:
        """The same with keys and values in one tensor, (2, G, K, R * T, E)."""
        new, seen = self._room(layer, both.shape[3])
        new.copy_(both)
        return seen

    def by_text(self, x: Tensor) -> Tensor:
        """(B, T, ...) as (G, R * T, ...), the rows of a text as positions of one."""
        if self.places is None:
            return x
        assert x.shape[1] == 1, "rows that were selected go on token by token"
        return x.reshape(*self._seen.shape[:2], *x.shape[2:])

    def _room(self, layer: int, n: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Where n new positions or columns go, and keys and values up to these."""
        start = self.length if self.places is None else self._columns
        held, end = self._layers[layer], start + n
        assert end <= held.shape[3], "the cache is full"
        seen = held.narrow(3, 0, end)
        return held.narrow(3, start, n), (seen[0], seen[1])

    def advance(self, n: int) -> None:
        """n positions more have been stored in every layer."""
        self.length += n
        if self.places is not None:
            self._columns += len(self._own) * n

    def select(self, rows: Sequence[int]) -> Tensor | None:
        """Go on with these rows of the batch, in this order; one may come several times.

        Returns which texts are kept for that, (G,) int64; None: all, as they are.
        """
        if self.places is None:
            if list(rows) == list(range(self._held.shape[2])):
                return None
            self.begin_columns()
        n_texts, each = self._seen.shape[:2]
        texts, more = [row // each for row in rows], len(rows) // n_texts
        kept = None
        if texts != [text for text in range(n_texts) for _ in range(more)]:
            kept = _texts_of_equally_many(texts)
        groups = n_texts if kept is None else len(kept)
        n = len(rows) // groups
        index = torch.tensor(rows, device=self._held.device)
        self._seen = self._seen.flatten(0, 1).index_select(0, index).view(groups, n, -1)
        if n != len(self._own):
            self._own = self._seen.new_full((n, n), -math.inf).fill_diagonal_(0)
        if kept is None:
            return None
        index, old = torch.tensor(kept, device=self._held.device), self._held
        self._hold(old.new_empty(*old.shape[:2], len(kept), *old.shape[3:]))
        self._held[:, :, :, :, : self._columns] = old[:, :, :, :, : self._columns].index_select(2, index)
        assert self.places is not None
        self.places = self.places[index]
        return index

    def begin_columns(self) -> None:
        """From here on rows go on token by token, as after a `select`: each sees its own past without `documents`."""
        n_texts, room = self._held.shape[2], self._held.shape[4]
        self._columns, self._most, device = self.length, room, self._held.device
        self._seen = self._held.new_full((n_texts, 1, room), -math.inf)
        self._own = self._held.new_zeros(1, 1)
        if self.documents is None:
            self._seen[:, :, : self.length] = 0
        else:  # what comes belongs to the last one
            same = self.documents == self.documents[:, -1:]
            self._seen[:, 0, : self.length].masked_fill_(same, 0)
            self.documents = None
        self.places = torch.arange(room, device=device).repeat(n_texts, 1)

    @torch.compiler.disable
    def columns(self) -> Tensor:
        """What is added to the scores of each row's next position, (G, 1, R, S): it sees its own past and itself.

        Called before the position is stored in any layer, once rows have columns of their own.
        """
        assert self.places is not None
        if self._columns + len(self._own) > self._most:
            self._leave_behind()
        start, end = self._columns, self._columns + len(self._own)
        self._seen[:, :, start:end] = self._own
        self.places[:, start:end] = self.length
        return self._seen[:, None, :, :end]

    def _leave_behind(self) -> None:
        """Leave columns behind that no row of their text sees, and make room."""
        assert self.places is not None
        (n_texts, each), old = self._seen.shape[:2], self._held
        some = (self._seen[:, :, : self._columns] == 0).any(1)  # (G, S)
        n = int(some.sum(1).max())
        kept = some.byte().sort(dim=1, descending=True, stable=True).indices[:, :n]  # behind them those that fill up
        most, room = n + max(_MORE * each, n // 4), old.shape[4]
        if most > room:
            room = most + _MORE * each
            self._hold(old.new_empty(*old.shape[:4], room, old.shape[5]))
        # as rows of numbers, which are gathered in one go
        starts = torch.arange(old.shape[:4].numel(), device=old.device).view(*old.shape[:4], 1) * old.shape[4]
        places_of = (starts + kept[:, None]).flatten()
        moved = old.view(-1, old.shape[5]).index_select(0, places_of)
        self._held[:, :, :, :, :n] = moved.view(*old.shape[:4], n, old.shape[5])
        seen, places = self._seen.new_full((n_texts, each, room), -math.inf), self.places.new_zeros(n_texts, room)
        seen[:, :, :n] = self._seen.gather(2, kept[:, None].expand(-1, each, -1))
        places[:, :n] = self.places.gather(1, kept)
        self._seen, self.places, self._columns, self._most = seen, places, n, most


_MORE = 8
"""Positions of each row, at least, until columns are left behind again: few, as attention reads them all."""


def _texts_of_equally_many(texts: Sequence[int]) -> list[int]:
    """The text of each run of rows of the same one, if all runs are equally long; else that of each row."""
    runs = [[texts[0], 0]]
    for text in texts:
        if text != runs[-1][0]:
            runs.append([text, 0])
        runs[-1][1] += 1
    return [text for text, _ in runs] if len({n for _, n in runs}) == 1 else list(texts)


class Visible(NamedTuple):
    """What attention may see: a mask (B or 1, 1 or heads, T, S), with a cache of selected rows (G, 1 or heads, R, S);
    boolean, True where it may, or what is added to the scores. None with `causal`: all before."""

    mask: Tensor | None
    causal: bool


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to scores, which attention would otherwise make of it in every layer and step."""
    return torch.where(mask, 0.0, -math.inf).to(dtype)


def visible(tokens: Tensor, documents: Tensor | None, cache: KVCache | None, prefix: Tensor | None = None) -> Visible:
    """Each position sees itself and those before it, with `documents` (B, T) only those of its own document.

    With a cache the new positions stand at the right of the cached ones, whose documents it remembers; once rows
    have columns of their own, `documents` are not looked at: new ones belong to the last. The first `prefix` (B,)
    positions of a row see one another both ways (Raffel et al. 2020, section 3.2.1); not with a cache that holds
    something already.
    """
    if cache is not None and cache.places is not None:
        return Visible(cache.columns(), causal=False)
    length = tokens.shape[1]
    start = 0 if cache is None else cache.length
    keys = documents
    if cache is not None and documents is not None:
        assert start == 0 or cache.documents is not None, "the cached positions were given no documents"
        keys = documents if cache.documents is None else torch.cat((cache.documents, documents), 1)
        cache.documents = keys
    if documents is None and prefix is None and (start == 0 or length == 1):
        return Visible(None, causal=length > 1)
    if length == 1 and documents is not None and keys is not None and prefix is None:  # nothing is later
        mask = documents[:, None, :, None] == keys[:, None, None, :]
        if cache is not None:
            mask = _added(mask, cache.dtype)
        return Visible(mask, causal=False)
    ones = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device)
    mask = ones.tril(start)[None, None]
    if prefix is not None:
        assert start == 0, "a prefix is read at once"
        inside = torch.arange(length, device=tokens.device) < prefix[:, None]  # (B, T)
        mask = mask | (inside[:, None, :, None] & inside[:, None, None, :])
    if documents is not None:
        assert keys is not None
        mask = mask & (documents[:, None, :, None] == keys[:, None, None, :])
    return Visible(mask, causal=False)


class Across(NamedTuple):
    """What cross-attention may see, and which positions see anything: (B, U, 1), None: all do."""

    seen: Visible
    some: Tensor | None


class CrossCache(KVCache):
    """What the decoder has seen, and the memory's keys and values, which the first step leaves here: once for all rows
    that read the same text."""

    def __init__(
        self, n_layers: int, batch: int, n_heads: int, length: int, d_head: int, device: Any, dtype: torch.dtype
    ) -> None:
        """Room for `length` decoder positions of `batch` rows."""
        super().__init__(n_layers, batch, n_heads, length, d_head, device, dtype)
        self.cross: list[tuple[Tensor, Tensor]] = []
        """Of each layer, keys and values (G, H, S, E)."""
        self.across: Across | None = None
        """What is seen of the memory, if it is the same for all tokens."""

    def select(self, rows: Sequence[int]) -> Tensor | None:
        texts = super().select(rows)
        if texts is not None:
            self.across = None
            self.cross = [(keys[texts], values[texts]) for keys, values in self.cross]
        return texts


def see_across(
    memory: Tensor, documents: Tensor | None, decoder_documents: Tensor | None, cache: CrossCache | None
) -> Across:
    """Decoder tokens (B, U) see the tokens of `memory` (B, S, D), with a cache (G, S, D), of the same document.

    Where documents of one side alone are given, all on the other is document 0; without the decoder's, what is seen is
    the same for all its tokens, and a cache keeps it.
    """
    if documents is None and decoder_documents is None:
        return Across(Visible(None, causal=False), some=None)
    kept = cache if decoder_documents is None else None
    if kept is not None and kept.across is not None:
        return kept.across
    if documents is None:
        documents = memory.new_zeros(memory.shape[:2], dtype=torch.long)
    if decoder_documents is None:
        decoder_documents = torch.zeros_like(documents[:, :1])
    mask = decoder_documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, U or 1, S)
    some = mask.any(-1, keepdim=True)
    # a softmax over nothing may be NaN: who has nothing to see is let see all, and what comes of it is made zero
    seen = mask | ~some
    if kept is None:
        return Across(Visible(seen, causal=False), some[:, 0])
    kept.across = Across(Visible(_added(seen, kept.dtype), causal=False), None if some.all() else some[:, 0])
    return kept.across
