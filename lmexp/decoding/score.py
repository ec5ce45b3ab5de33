"""The log-likelihood of given continuations, many at once.

Decoders and encoder-decoders: log P(y | prompt) = sum_t log p(y_t | prompt, y_<t), all t in one forward pass.
Encoders: the pseudo-log-likelihood (Salazar et al. 2020, eq. 1) of the continuation y, sum_t log p(y_t | all others), a
row of the pass for each t, in which that token is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmexp.contracts import UserError

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its continuation, at least one each."""


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    batch_size: int,
    prefix_lm: bool = False,
    mask_id: int | None = None,
    end: tuple[int, ...] = (),
) -> list[float]:
    """Nats, at most 0, of each pair's continuation given its prompt, summed over its tokens.

    A decoder reads the prompt and the continuation as one text, an encoder-decoder the prompt with its encoder; a
    document's end is the caller's to add. `prefix_lm`: a decoder sees the prompt both ways. `mask_id` and `end`, for
    encoders: the mask token, and what follows the continuation. `batch_size`: rows of a forward pass; rows of like
    length stand together, and no row depends on another. Equal pairs are scored once. The probabilities are those of
    the loss: a padded vocabulary takes part. The model runs in evaluation mode and is left in the mode it was in.
    Raises `UserError` for empty prompts and continuations, and for pairs longer than the model's `max_length`.
    """
    unique = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    rows = [row for pair, number in unique.items() for row in _rows(model, pair, number, prefix_lm, mask_id, end)]
    rows.sort(key=lambda row: (len(row.tokens), len(row.decoder_tokens)))
    nats = torch.zeros(len(unique), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            losses = _losses(model, batch).cpu().double()
            nats.index_add_(0, torch.tensor([row.owner for row in batch for _ in row.labels]), losses)
    finally:
        model.train(was_training)
    return [-nats[unique[pair]].item() for pair in pairs]


class _Row(NamedTuple):
    """A row of a forward pass."""

    owner: int
    """The number of the pair that it is of."""

    tokens: tuple[int, ...]
    decoder_tokens: tuple[int, ...]
    """Of an encoder-decoder; else none."""

    places: range
    """Of the hidden states that are scored."""

    labels: tuple[int, ...]
    """The tokens that they are scored on."""

    prefix: int | None = None
    """How many first positions see one another both ways."""


def _rows(
    model: Any, pair: Pair, owner: int, prefix_lm: bool, mask_id: int | None, end: tuple[int, ...]
) -> Iterator[_Row]:
    prompt, continuation = pair
    n = len(prompt)
    if not prompt or not continuation:
        raise UserError("a prompt or continuation has no tokens; give it text, or the end-of-document token.")
    if model.family == "decoder":
        row = _Row(owner, prompt + continuation[:-1], (), range(n - 1, n - 1 + len(continuation)), continuation)
        rows = [row._replace(prefix=n) if prefix_lm else row]
    elif model.family == "encoder_decoder":
        written = (model.decoder_start_id, *continuation[:-1])
        rows = [_Row(owner, prompt, written, range(len(continuation)), continuation)]
    else:
        assert mask_id is not None, "an encoder scores masked tokens"
        text = prompt + continuation + end
        rows = [
            _Row(owner, (*text[:i], mask_id, *text[i + 1 :]), (), range(i, i + 1), text[i : i + 1])
            for i in range(n, n + len(continuation))
        ]
    for row in rows:
        longest = max(len(row.tokens), len(row.decoder_tokens))
        if longest > model.max_length:
            raise UserError(f"a text of {longest} tokens is to be scored, the model reads {model.max_length}; cut it.")
        yield row


def _losses(model: Any, rows: Sequence[_Row]) -> Tensor:
    """-log p (N,) of the labels of all rows, row by row."""
    device = model.head.weight.device
    tokens, documents = _padded([row.tokens for row in rows], device)
    inputs = {"tokens": tokens}
    padded = bool((documents < 0).any())
    if model.family == "encoder" and padded:
        inputs["documents"] = documents
    elif model.family == "encoder_decoder":
        # padding stands at the right, where a decoder does not look
        inputs["decoder_tokens"] = _padded([row.decoder_tokens for row in rows], device)[0]
        if padded:
            inputs |= {"documents": documents, "decoder_documents": torch.zeros_like(inputs["decoder_tokens"])}
    if rows[0].prefix is not None:
        inputs["prefix"] = torch.tensor([row.prefix for row in rows], device=device)
    hidden = model(**inputs)  # (B, T or U, D)
    row_of = torch.tensor([number for number, row in enumerate(rows) for _ in row.places], device=device)
    places = torch.tensor([place for row in rows for place in row.places], device=device)
    labels = torch.tensor([label for row in rows for label in row.labels], device=device)
    losses: Tensor = model.head.loss(hidden[row_of, places], labels, reduction="none")
    return losses


def _padded(texts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts of any length side by side, (B, T) int64, and their documents: 0, and -1 for the padding at the right."""
    width = max(len(text) for text in texts)
    tokens = torch.tensor([(*text, *(0,) * (width - len(text))) for text in texts], device=device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    return tokens, -(torch.arange(width, device=device) >= lengths[:, None]).long()
