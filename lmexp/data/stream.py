"""Samples of a corpus too large to cache, tokenized as they are read, with exact resume."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lmexp.contracts import Batch, Sample, UserError
from lmexp.data.loader import Recipe, pinned
from lmexp.data.packing import document_ids, stride_of
from lmexp.tokenizer.tokenizer import Tokenizer

_DOCUMENTS = 32  # encoded at once, for the tokenizer's threads


@dataclass(frozen=True)
class _Segment:
    """The tokens of some documents in a row, each with its end."""

    rows: dict[str, Any] | None
    """State of the `datasets` stream before these documents; None: its beginning."""

    opening: bool
    """Whether the document end that the stream begins with is the first of the tokens."""

    tokens: np.ndarray
    """(n,) int64."""


class TokenStream:
    """Training samples in the order of a `datasets.IterableDataset`, which begins again when it ends.

    Sample i is a function of the documents and i. The state says where the next sample begins: the state of the
    `datasets` stream before the documents in hand, and how many tokens of these are used up.
    """

    def __init__(
        self,
        rows: Callable[[], Any],
        tokenizer: Tokenizer,
        length: int,
        block_size: int,
        mask_eos: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`rows` gives the stream from its beginning; `length` tokens a sample, of which neighbours share what
        `stride_of` says; `mask_eos` as in `PackedTokens`; `state` is what `state_dict` gave, None: begin."""
        state = state or {"index": 0, "rows": None, "opening": True, "used": 0}
        self._new_rows = rows
        self.tokenizer = tokenizer
        self.length = length
        self.stride = stride_of(length, block_size)
        self.mask_eos = mask_eos
        self.index = state["index"]
        self._used = state["used"]  # tokens of the first segment that are behind the next sample
        self._opening = state["opening"]
        self._segments: list[_Segment] = []
        self._restart(state["rows"])

    def state_dict(self) -> dict[str, Any]:
        """Where the next sample begins, as plain JSON."""
        first = self._segments[0] if self._segments else _Segment(self._state, self._opening, np.empty(0))
        return {"index": self.index, "rows": first.rows, "opening": first.opening, "used": self._used}

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples."""
        needed = (count - 1) * self.stride + self.length
        while sum(len(segment.tokens) for segment in self._segments) - self._used < needed:
            self._read()
        buffer = np.concatenate([segment.tokens for segment in self._segments])[self._used :]
        starts = np.arange(count) * self.stride
        tokens = buffer[starts[:, None] + np.arange(self.length)]  # (count, length)
        n_bytes = self.tokenizer.token_bytes[tokens]
        masks = [None] * count if self.mask_eos is None else list(document_ids(tokens, self.mask_eos))
        samples = [Sample(tokens[k], n_bytes[k], self.index + k, masks[k]) for k in range(count)]
        self.index += count
        self._used += count * self.stride
        while self._segments and self._used >= len(self._segments[0].tokens):
            self._used -= len(self._segments.pop(0).tokens)
        return samples

    def _restart(self, state: dict[str, Any] | None) -> None:
        self._rows = self._new_rows()
        if state is not None:
            self._rows.load_state_dict(state)
        self._state = state  # where `_rows` stands
        self._documents = iter(self._rows)

    def _read(self) -> None:
        """Append the next documents as a segment."""
        before = self._state
        texts = [row["text"] for row in islice(self._documents, _DOCUMENTS)]
        if not texts:
            if before is None:
                raise UserError("The streaming training split holds no documents; choose another corpus or split.")
            self._restart(None)
            return
        self._state = self._rows.state_dict()
        eos = np.array([self.tokenizer.eos_id])
        parts = [part for ids in self.tokenizer.encode([text for text in texts if text]) for part in (ids, eos)]
        if self._opening:
            parts.insert(0, eos)
        tokens = np.concatenate([eos[:0], *parts]).astype(np.int64)
        self._segments.append(_Segment(before, self._opening, tokens))
        self._opening = False


class StreamBatches:
    """Endless batches of one rank: its slice of every global batch, with the state after each.

    What was handed out may not have been trained on yet, so the state goes to `on_batch` with the count of samples
    it belongs to, and whoever moves the cursor picks the one that fits.
    """

    def __init__(
        self,
        open_stream: Callable[[], TokenStream],
        recipe: Recipe,
        batch_size: int,
        local: slice,
        ahead: int,
        pin_memory: bool,
        on_batch: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """`local` is this rank's slice of the global batch; `ahead` batches are made by a thread meanwhile, 0: none."""
        self.open_stream = open_stream
        self.recipe = recipe
        self.batch_size = batch_size
        self.local = local
        self.ahead = ahead
        self.pin_memory = pin_memory
        self.on_batch = on_batch

    def __iter__(self) -> Iterator[Batch]:
        made = self._make()
        for batch, seen, state in _ahead(made, self.ahead) if self.ahead else made:
            self.on_batch(seen, state)
            yield batch

    def _make(self) -> Iterator[tuple[Batch, int, dict[str, Any]]]:
        stream = self.open_stream()
        while True:
            samples = stream.take(self.batch_size)[self.local]
            batch = self.recipe(samples)
            yield (pinned(batch) if self.pin_memory else batch), stream.index, stream.state_dict()


def _ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The same items, made by a thread that stays at most `count` ahead."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=count)
    stop = threading.Event()

    def put(item: Any, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if stop.is_set():
                    return
        except BaseException as error:  # raised again where the batch is asked for
            put(None, error)

    thread = threading.Thread(target=work, daemon=True, name="stream")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
