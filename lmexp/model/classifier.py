"""A head that tells what a text is, in place of the one over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lmexp.model.layers import dropped

Pooling = Literal["first", "mean", "last"]
_INIT_STD = 0.02  # as BERT's
POOLINGS = ("first", "mean", "last")


def pool(hidden: Tensor, documents: Tensor, count: int, pooling: Pooling) -> Tensor:
    """One vector for each text of a row: hidden (B, T, D) and documents (B, T), which text each position is of, give
    (B, count, D); `first` or `last` position, or the `mean` of all. Texts that are not there get what is finite."""
    of = documents[:, None, :] == torch.arange(count, device=documents.device)[None, :, None]  # (B, count, T)
    if pooling == "mean":
        share = of.to(hidden.dtype)
        return (share @ hidden) / share.sum(-1, keepdim=True).clamp_min(1)
    end = documents.shape[1] - 1
    places = of.int().argmax(-1) if pooling == "first" else end - of.flip(-1).int().argmax(-1)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


class ClassifierHead(nn.Module):
    """Logits of classes from a text's vector: dropout, tanh(x W + b), dropout, x V + c, as RoBERTa's released
    classifiers; BERT's have no first dropout. Without `hidden` the last two only."""

    def __init__(
        self,
        d_model: int,
        labels: Sequence[str],
        hidden: bool,
        dropout: float,
        pooling: Pooling = "first",
        multilabel: bool = False,
        input_dropout: float | None = None,
    ) -> None:
        """`labels` name the classes. `pooling` and `multilabel` say what its vectors are and what its logits mean.
        `input_dropout`: the first dropout; None: as `dropout`."""
        super().__init__()
        self.labels, self.pooling, self.multilabel = tuple(labels), pooling, multilabel
        self.dropout = dropout
        self.input_dropout = dropout if input_dropout is None else input_dropout
        self.hidden = nn.Linear(d_model, d_model) if hidden else None
        self.output = nn.Linear(d_model, len(self.labels))
        for layer in (self.hidden, self.output):
            if layer is not None:
                nn.init.normal_(layer.weight, std=_INIT_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (..., classes) of vectors (..., D)."""
        if self.hidden is not None:
            pooled = torch.tanh(self.hidden(dropped(pooled, self.input_dropout, self.training)))
        logits: Tensor = self.output(dropped(pooled, self.dropout, self.training))
        return logits
