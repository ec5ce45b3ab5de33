"""A model that writes one token after another for many rows at once, whoever chooses them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lmexp.contracts import UserError


class Steps(Protocol):
    """Rows that are written together."""

    most: int
    """Tokens that can be written at most."""

    def logits(self) -> Tensor:
        """Of the next token of each row, (rows, V); once for each token."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Write the next token of each row, (rows,)."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may come several times. Then the next token of each is written."""
        ...


def steps_of(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Steps:
    """A decoder continues the prompts, an encoder-decoder reads them, its last `max_length` tokens, and answers."""
    return (_Answers if model.family == "encoder_decoder" else _Continuations)(model, prompts, max_new_tokens)


def begun(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What stands before the first new token of each row."""
    if model.family == "encoder_decoder":
        return [[model.decoder_start_id] for _ in prompts]
    return [list(prompt) for prompt in prompts]


def without_gradients(model: Any) -> Any:
    """A context; the inference mode of torch, which costs less, but where weights are in pieces: what is brought
    together in it could not be trained with afterwards."""
    return torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode()


_SMALL = 2**25
"""Numbers in the matrices that are stored anew, up to which that is soon repaid."""


@contextmanager
def weights_for(model: Any, rows: int) -> Iterator[None]:
    """On a CPU, matrices are stored inside in the way in which so few rows are multiplied with them the fastest: by
    columns, and the head as oneDNN wants it. Larger models, whose matrices no cache holds, stay as they are."""
    looked_up = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
    writing = getattr(model, "decoder", model)  # what an encoder reads are many rows, once
    linears = [
        part
        for part in writing.modules()
        if isinstance(part, nn.Linear) and _is_plain(part.weight) and part.weight not in looked_up
    ]
    head = model.head if hasattr(model.head, "pack") and _is_plain(model.head.weight) else None
    size = sum(part.weight.numel() for part in linears) + (0 if head is None else head.weight.numel())
    if size > _SMALL or isinstance(model, FSDPModule):
        yield
        return
    before = [(part.weight, part.weight.data) for part in linears]
    try:
        for weight, by_rows in before:
            weight.data = by_rows.t().contiguous().t()
        if head is not None:
            head.pack(rows)
        yield
    finally:
        for weight, by_rows in before:
            weight.data = by_rows
        if head is not None:
            head.packed = None


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and type(weight) is nn.Parameter and weight.is_contiguous()


class _Continuations:
    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.most = max_new_tokens
        weight = model.head.weight
        device = weight.device
        self.width = width = max(len(prompt) for prompt in prompts)
        # rows end together: shorter prompts are padded at the left, and the padding is a document of its own, -1
        self.tokens = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.int64, device=device)
        self.pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        self.padding = width - min(len(prompt) for prompt in prompts)
        for row, prompt in enumerate(prompts):
            self.tokens[row, width - len(prompt) : width] = torch.tensor(list(prompt), device=device)
        self.room = min(model.max_length, width + max_new_tokens)
        self.columns = torch.arange(self.tokens.shape[1], device=device)
        self.cache: Any = None
        if width <= self.room:
            self.cache = model.new_cache(len(prompts), self.room, device, _dtype(weight))

    def logits(self) -> Tensor:
        if self.cache is not None and self.width > self.room:
            self.cache = None  # the window slides: every position of it changes, so that nothing can be kept
        start = max(0, self.width - self.model.max_length) if self.cache is None else self.cache.length
        return self.model.head(self._hidden(start)[:, -1])

    def _hidden(self, start: int) -> Tensor:
        """Hidden states of the columns from `start` on; without a cache these are all that is seen."""
        tokens = self.tokens[:, start : self.width]
        if self.cache is not None and self.cache.places is not None:
            return self.model(tokens, positions=start - self.pads[:, None], cache=self.cache)
        if self.padding <= (start if self.cache is None else 0):
            return self.model(tokens, cache=self.cache)
        pads = self.pads if self.cache is not None else (self.pads - start).clamp_min(0)
        offset = start if self.cache is not None else 0
        positions = self.columns[offset : offset + tokens.shape[1]] - pads[:, None]
        documents = torch.zeros_like(tokens)
        if offset < self.padding:
            documents, positions = documents - (positions < 0).long(), positions.clamp_min_(0)
        hidden = self.model(tokens, documents=documents, positions=positions, cache=self.cache)
        if self.cache is not None:
            self.cache.begin_columns()  # which padding is not seen is known from here on
        return hidden

    def append(self, tokens: Tensor) -> None:
        self.tokens[:, self.width] = tokens
        self.width += 1

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.tokens.device)
        self.tokens, self.pads = self.tokens[index], self.pads[index]
        if self.cache is not None:
            self.cache.select(rows)


class _Answers:
    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.most = min(model.max_length, max_new_tokens)
        weight = model.head.weight
        device = weight.device
        prompts = [list(prompt)[-model.max_length :] for prompt in prompts]
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        documents = torch.full_like(tokens, -1)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
            documents[row, : len(prompt)] = 0
        self.documents: Tensor | None = None
        more = {}
        if (documents < 0).any():
            self.documents = documents
            more = {"documents": documents, "positions": torch.arange(width, device=device).expand_as(tokens)}
        self.memory = model.encode(tokens, **more)
        self.cache: Any = model.new_cache(len(prompts), self.most, device, _dtype(weight))
        self.last = torch.full((len(prompts),), model.decoder_start_id, dtype=torch.int64, device=device)

    def logits(self) -> Tensor:
        hidden = self.model.decode(self.last[:, None], self.memory, self.documents, cache=self.cache)
        return self.model.head(hidden[:, -1])

    def append(self, tokens: Tensor) -> None:
        self.last = tokens

    def select(self, rows: Sequence[int]) -> None:
        texts = self.cache.select(rows)
        if texts is None:
            return
        self.memory = self.memory[texts]
        if self.documents is not None:
            self.documents = self.documents[texts]


def _dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass(frozen=True)
class Constraints:
    """Tokens that may not be written next."""

    min_new_tokens: int
    no_repeat_ngram: int | None

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return self.min_new_tokens > 0 or self.no_repeat_ngram is not None

    def __call__(self, scores: Tensor, texts: Sequence[Sequence[int]], written: int, eos_id: int | None) -> Tensor:
        """`scores` (rows, V) with minus infinity where a token is forbidden after `texts`, of which `written` tokens
        are new. Where all are forbidden, none is."""
        banned = [[] if self.no_repeat_ngram is None else completions(text, self.no_repeat_ngram) for text in texts]
        if eos_id is not None and written < self.min_new_tokens:
            banned = [[*row, eos_id] for row in banned]
        if not any(banned):
            return scores
        kept = scores.clone()
        rows = [number for number, row in enumerate(banned) for _ in row]
        kept[rows, [token for row in banned for token in row]] = -torch.inf
        if min(len(row) for row in banned) == 1 and self.no_repeat_ngram is None:
            return kept  # the end alone is forbidden
        return torch.where((kept == -torch.inf).all(-1, keepdim=True), scores, kept)


def completions(text: Sequence[int], n: int) -> list[int]:
    """The tokens that would make the last n - 1 tokens of a text an n-gram that it has already."""
    if len(text) < n:
        return []
    last = tuple(text[len(text) - n + 1 :])
    return sorted({text[i + n - 1] for i in range(len(text) - n + 1) if tuple(text[i : i + n - 1]) == last})


def check_lengths(max_new_tokens: int, min_new_tokens: int, no_repeat_ngram: int | None) -> None:
    """Raise `UserError` for lengths that are none."""
    for name, value in (("max_new_tokens", max_new_tokens), ("min_new_tokens", min_new_tokens)):
        if not isinstance(value, int):
            raise UserError(f"decoding.{name}={value}; expected a whole number.")
    if max_new_tokens < 1:
        raise UserError(f"decoding.max_new_tokens={max_new_tokens}; expected at least 1.")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise UserError(
            f"decoding.min_new_tokens={min_new_tokens}; expected at least 0 and at most max_new_tokens="
            f"{max_new_tokens}."
        )
    if no_repeat_ngram is not None and (not isinstance(no_repeat_ngram, int) or no_repeat_ngram < 1):
        raise UserError(f"decoding.no_repeat_ngram={no_repeat_ngram}; expected at least 1, or null.")
