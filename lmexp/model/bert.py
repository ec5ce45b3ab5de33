"""BERT (Devlin et al. 2019, section 3): an encoder whose positions all see one another, and its masked-token head.

As published: token, position and segment embeddings, normed; LayerNorm after each residual sum, exact GELU, biases. By
options it is RoBERTa (Liu et al. 2019: one segment), XLM (Lample & Conneau 2019, section 3.4: a language embedding, a
plain head), or modern (ModernBERT, Warner et al. 2024, section 2.1: norms first, rotary positions, GeGLU, no biases;
theirs looks at neighbours only in two of three layers, here all look everywhere).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import Family, UserError
from lmexp.model.kv_cache import Visible
from lmexp.model.layers import (
    FusedLinear,
    Head,
    Rotary,
    attend,
    attend_to_self,
    check_fraction,
    check_heads,
    check_positive,
    dropped,
    residual,
    rotate,
    round_up,
    training_flops,
)


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT."""

    family: ClassVar[Family] = "encoder"

    n_layers: int
    """Blocks of attention and feed-forward."""

    n_heads: int
    """Attention heads of a block; divides `d_model`."""

    d_model: int
    """Width of the residual stream."""

    max_length: int
    """Longest text in tokens: the rows of the position table, or the places that rotary tables are made for."""

    d_ff: int | None = None
    """Width inside the feed-forward; null: 4 * d_model."""

    n_segments: int = 2
    """Rows of the segment (token type) table, at least 0; 0: none."""

    n_languages: int = 0
    """Rows of the language table (XLM), at least 0; 0: none."""

    prenorm: bool = False
    """Norm before each sublayer and at the end; false: after each residual sum, as published."""

    rope: bool = False
    """Rotary positions instead of a learned table."""

    rope_theta: float = 10000.0
    """Base of the rotary wavelengths; greater than 0."""

    gated: bool = False
    """The feed-forward is (gelu(x Wg) * x Wu) Wd (GeGLU, Shazeer 2020)."""

    bias: bool = True
    """Biases in linear layers and norms, as published. The logits have one in any case."""

    head_transform: bool = True
    """The head begins with a layer of its own, as published; false: it is the embedding and a bias (XLM)."""

    dropout: float = 0.1
    """Share of numbers dropped from embeddings and sublayer outputs in training; in [0, 1)."""

    attention_dropout: float = 0.1
    """Share of attention weights dropped in training; in [0, 1)."""

    norm_eps: float = 1e-12
    """Added to the variance in norms; greater than 0."""

    init_std: float = 0.02
    """Standard deviation of all matrices at the start; greater than 0."""

    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this; 64 or 128 suits GPUs."""

    def __post_init__(self) -> None:
        check_positive(
            "model",
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            max_length=self.max_length,
            d_ff=self.ff_width,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            init_std=self.init_std,
            vocab_multiple=self.vocab_multiple,
        )
        check_heads("model", self.d_model, self.n_heads)
        check_fraction("model", dropout=self.dropout, attention_dropout=self.attention_dropout)
        for key, value in (("n_segments", self.n_segments), ("n_languages", self.n_languages)):
            if value < 0:
                raise UserError(f"model.{key}={value}; expected a number of at least 0, where 0 is no such embedding.")
        if self.rope and self.d_model // self.n_heads % 2:
            raise UserError(
                f"model.d_model={self.d_model} over n_heads={self.n_heads} gives heads of odd width; rotary positions "
                "need an even one: change one of them, or set model.rope=false."
            )

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    def build(self, vocab_size: int) -> Bert:
        """The model at random weights for token ids below `vocab_size`."""
        return Bert(self, round_up(vocab_size, self.vocab_multiple))


class Bert(nn.Module):
    """Tokens (B, T) int64 to hidden states (B, T, D); `head` turns these into logits and losses."""

    def __init__(self, config: BertConfig, vocab_size: int) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_length, self.n_layers = vocab_size, c.max_length, c.n_layers
        self.family = c.family
        self.embed = nn.Embedding(vocab_size, c.d_model)
        self.position = None if c.rope else nn.Embedding(c.max_length, c.d_model)
        self.rotary = Rotary(c.d_model // c.n_heads, c.max_length, c.rope_theta) if c.rope else None
        self.segment = nn.Embedding(c.n_segments, c.d_model) if c.n_segments else None
        self.language = nn.Embedding(c.n_languages, c.d_model) if c.n_languages else None
        self.embed_norm = norm(c)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = norm(c) if c.prenorm else None
        self.head = MLMHead(c, self.embed) if c.head_transform else Head(c.d_model, vocab_size, self.embed, bias=True)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Matrices normal(0, `init_std`), biases zero (Devlin et al.'s code, which cuts the normal at 2 sigma)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(std=self.config.init_std)
            elif name.endswith("bias"):
                p.zero_()

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D).

        All arguments are (B, T) int64. `documents`: tokens see those of their own document only; padding is document
        -1. `positions`: places instead of 0, 1, ... `segments` and `languages`: rows of these tables; None: row 0.
        """
        length = tokens.shape[1]
        assert length <= self.max_length, f"{length} positions, the model has {self.max_length}"
        x = self.embed(tokens)  # (B, T, D)
        if self.position is not None:
            x = x + (self.position.weight[:length] if positions is None else self.position(positions))
        for name, table, rows in (("segments", self.segment, segments), ("languages", self.language, languages)):
            assert table is not None or rows is None, f"{name} are given, the model has no embedding of them"
            if table is not None:
                x = x + (table.weight[0] if rows is None else table(rows))
        x = dropped(self.embed_norm(x), self.config.dropout, self.training)

        # padding sees padding: a softmax over nothing would be NaN
        mask = None if documents is None else documents[:, None, :, None] == documents[:, None, None, :]
        seen = Visible(mask, causal=False)
        tables = None if self.rotary is None else self.rotary.tables(0, length, positions, x.dtype)
        for block in self.blocks:
            x = block(x, tables, seen)
        return x if self.norm is None else self.norm(x)

    def flops_per_token(self, length: int, scored: float = 1.0) -> float:
        """FLOPs a token of a training step at texts of `length` tokens; see `training_flops`.

        `scored`: share of the positions that the head is asked for.
        """
        tables = (self.position, self.segment, self.language)
        lookups = sum(table.weight.numel() for table in tables if table is not None)
        unscored = (1 - scored) * sum(p.numel() for p in self.head.parameters())
        return training_flops(self, lookups, self.config.d_model, self.n_layers, length) - 6.0 * unscored


class MLMHead(Head):
    """A layer of its own, then the embedding as the output matrix, and a bias (section 3.1 and the released code).

    The layer is part of `forward` and `loss`, so that it costs scored positions only.
    """

    def __init__(self, c: BertConfig, tied: nn.Embedding) -> None:
        super().__init__(c.d_model, tied.num_embeddings, tied=tied, bias=True)
        self.transform = Transform(c)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place, the loss and the layer before it too."""
        super().compile(*args, **kwargs)
        self.transform.compile(*args, **kwargs)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), at least float32, of hidden states (..., D)."""
        return super().forward(self.transform(hidden))

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        n_chunks: int | None = None,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """As `Head.loss`, of hidden states (N, D) before the layer."""
        return super().loss(self.transform(hidden), labels, n_chunks, reduction)

    def smoothing(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """As `Head.smoothing`, of hidden states (N, D) before the layer."""
        return super().smoothing(self.transform(hidden), labels)


class Transform(nn.Module):
    """norm(gelu(x W + b)), (..., D) to (..., D)."""

    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.d_model, c.d_model, bias=c.bias)
        self.norm = norm(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


def norm(c: BertConfig) -> nn.LayerNorm:
    """A LayerNorm of the model's width."""
    return nn.LayerNorm(c.d_model, eps=c.norm_eps, bias=c.bias)


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); `prenorm`: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: BertConfig, layer: int) -> None:
        super().__init__()
        self.prenorm = c.prenorm
        # the embeddings' norm is the first one already (Warner et al. 2024, section 2.1.1)
        self.norm1 = nn.Identity() if c.prenorm and layer == 0 else norm(c)
        self.attention = Attention(c)
        self.norm2 = norm(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, seen: Visible) -> Tensor:
        if self.prenorm:
            x = residual(x, self.attention(self.norm1(x), tables, seen))
            return residual(x, self.mlp(self.norm2(x)))
        x = self.norm1(x + self.attention(x, tables, seen))
        return self.norm2(x + self.mlp(x))


class Attention(nn.Module):
    """Multi-head self-attention, with rotary positions where there are `tables`."""

    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.attention_dropout = c.n_heads, c.dropout, c.attention_dropout
        self.qkv = FusedLinear(c.d_model, (c.d_model,) * 3, bias=c.bias)
        self.output = nn.Linear(c.d_model, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, seen: Visible) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, E)
        dropout = self.attention_dropout if self.training else 0.0
        if tables is None:
            mixed = attend_to_self(qkv, seen, None, 0, dropout)  # (B, T, D)
        else:
            q, k, v = qkv.unbind(2)
            q, k = rotate(q, tables), rotate(k, tables)
            mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, dropout)
        return dropped(self.output(mixed), self.dropout, self.training)


class MLP(nn.Module):
    """gelu(x W1) W2, or, gated, (gelu(x Wg) * x Wu) Wd."""

    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.gated, self.dropout = c.gated, c.dropout
        self.expand = FusedLinear(c.d_model, (c.ff_width,) * (2 if c.gated else 1), bias=c.bias)
        self.contract = nn.Linear(c.ff_width, c.d_model, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)  # (B, T, F) or (B, T, 2 F)
        if self.gated:
            gate, up = inner.chunk(2, -1)
            inner = F.gelu(gate) * up
        else:
            inner = F.gelu(inner)
        return dropped(self.contract(inner), self.dropout, self.training)
