"""The fast recipe: what has been found since GPT-2 to reach a loss in fewer steps, each part an option.

Rotary positions (Su et al. 2021); RMS norms without weights, at the embedding, before each sublayer and at the end;
normed queries and keys (Henry et al. 2020; Dehghani et al. 2023, section 2); ReLU squared (So et al. 2021,
section 4); zero-initialised projections back into the residual stream, so that every block starts as the identity;
capped logits (Gemma 2, 2024, section 2); values mixed with an embedding of the token (Zhou et al. 2024).
No biases. Few large operations a layer: at small widths a step is bound by their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmexp.contracts import Family, UserError
from lmexp.model.kv_cache import KVCache, Visible, visible
from lmexp.model.layers import (
    FusedLinear,
    Head,
    Rotary,
    attend_behind,
    check_fraction,
    check_heads,
    check_positive,
    dropped,
    relu_squared,
    residual,
    rotate,
    round_up,
    training_flops,
    unit_rms,
)


@dataclass(frozen=True)
class FastConfig:
    """The shape and the options of the fast recipe."""

    family: ClassVar[Family] = "decoder"

    n_layers: int
    """Blocks of attention and feed-forward."""

    n_heads: int
    """Attention heads of a block; divides `d_model`."""

    d_model: int
    """Width of the residual stream."""

    max_length: int
    """Longest context in tokens: the rows of the rotary tables."""

    d_ff: int | None = None
    """Width inside the feed-forward; null: 4 * d_model."""

    tied: bool = False
    """One matrix is both embedding and head."""

    qk_norm: bool = True
    """Queries and keys have length sqrt(d_head), so that attention cannot blow up at high rates."""

    attention_scale: float | None = None
    """Factor on query-key products; null: 1 / sqrt(d_head)."""

    zero_init: bool = True
    """Projections back into the residual stream start at zero, else at the rate of the other matrices."""

    softcap: float | None = 15.0
    """Logits stay within +- this; null: no cap."""

    value_layers: int = 0
    """The last so many layers add an embedding of the token to their values; a table of vocabulary x d_model each."""

    residual_gates: bool = False
    """Before each block the stream becomes a * x + b * embedding, with learned a (from 1) and b (from 0)."""

    dropout: float = 0.0
    """Share of numbers dropped from sublayer outputs in training; in [0, 1). Pays where text is seen several times."""

    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths: the longest is 2 pi * theta positions."""

    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this; 64 or 128 suits GPUs."""

    def __post_init__(self) -> None:
        check_positive(
            "model",
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            max_length=self.max_length,
            vocab_multiple=self.vocab_multiple,
            rope_theta=self.rope_theta,
            d_ff=1 if self.d_ff is None else self.d_ff,
            attention_scale=1 if self.attention_scale is None else self.attention_scale,
            softcap=1 if self.softcap is None else self.softcap,
        )
        check_heads("model", self.d_model, self.n_heads)
        check_fraction("model", dropout=self.dropout)
        if not 0 <= self.value_layers <= self.n_layers:
            raise UserError(f"model.value_layers={self.value_layers}; expected 0 to n_layers={self.n_layers}.")

    def build(self, vocab_size: int) -> Fast:
        """The model at random weights for token ids below `vocab_size`."""
        return Fast(self, round_up(vocab_size, self.vocab_multiple))


class Fast(nn.Module):
    """Tokens (B, T) int64 to hidden states (B, T, D); `head` turns these into logits and losses."""

    def __init__(self, config: FastConfig, vocab_size: int) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_length, self.n_layers = vocab_size, c.max_length, c.n_layers
        self.family = c.family
        self.embed = nn.Embedding(vocab_size, c.d_model)
        self.rotary = Rotary(c.d_model // c.n_heads, c.max_length, c.rope_theta)
        self.value_embeds = nn.ModuleList(ValueEmbedding(vocab_size, c.d_model) for _ in range(c.value_layers))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        # two numbers a block: the factor on the stream and that on the embedding
        self.gates = nn.Parameter(torch.tensor([1.0, 0.0] * c.n_layers)) if c.residual_gates else None
        self.head = Head(c.d_model, vocab_size, tied=self.embed if c.tied else None, softcap=c.softcap)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Matrices keep the scale of their input (standard deviation 1/sqrt(d_in)); embeddings are normed anyway.

        A tied matrix starts small, as the head wants it; an untied head too.
        """
        self.embed.weight.normal_(std=0.02 if self.config.tied else 1.0)
        if not self.config.tied:
            self.head.weight.normal_(std=0.001)
        for p in self.value_embeds.parameters():
            p.zero_()
        for block in self.blocks:
            for name, p in block.named_parameters():
                back = name.endswith(("output.weight", "contract.weight"))
                p.zero_() if back and self.config.zero_init else p.normal_(std=p.shape[1] ** -0.5)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D).

        `documents` (B, T): attention stops where they change. `positions` (B, T): instead of 0, 1, ...
        `cache`: `tokens` follow what it holds, and are added to it. `prefix` (B,): so many first positions see
        one another both ways.
        """
        length = tokens.shape[1]
        start = 0 if cache is None else cache.length
        assert start + length <= self.max_length, f"{start + length} positions, the model has {self.max_length}"
        seen = visible(tokens, documents, cache, prefix)
        x = first = unit_rms(self.embed(tokens))  # (B, T, D)
        cos, sin = self.rotary.tables(start, length, positions, x.dtype)
        tables = cos.unsqueeze(-2), sin.unsqueeze(-2)  # queries and keys are turned together
        without = self.n_layers - len(self.value_embeds)
        for layer, block in enumerate(self.blocks):
            if self.gates is not None:
                x = self.gates[2 * layer] * x + self.gates[2 * layer + 1] * first
            extra = self.value_embeds[layer - without](tokens) if layer >= without else None
            x = block(x, tables, extra, seen, cache)
        if cache is not None:
            cache.advance(length)
        return unit_rms(x)

    def flops_per_token(self, length: int) -> float:
        """FLOPs a token of a training step at context `length`; see `training_flops`."""
        tables = len(self.value_embeds) + (not self.config.tied)
        return training_flops(self, tables * self.embed.weight.numel(), self.config.d_model, self.n_layers, length)

    def new_cache(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `length` positions of `batch` sequences."""
        c = self.config
        return KVCache(c.n_layers, batch, c.n_heads, length, c.d_model // c.n_heads, device, dtype)


class ValueEmbedding(nn.Embedding):
    """What is added to the values of all heads."""

    heads_dim = -1
    """The dimension of what it gives that is shared out with the heads (`tensor_parallel`)."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + contract(relu(expand(norm(x)))^2)."""

    def __init__(self, c: FastConfig, layer: int) -> None:
        super().__init__()
        d_ff = c.d_ff or 4 * c.d_model
        self.dropout = c.dropout
        self.attention = Attention(c, layer)
        self.expand = nn.Linear(c.d_model, d_ff, bias=False)
        self.contract = nn.Linear(d_ff, c.d_model, bias=False)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], extra: Tensor | None, seen: Visible, cache: KVCache | None
    ) -> Tensor:
        x = residual(x, self._dropped(self.attention(unit_rms(x), tables, extra, seen, cache)))
        return residual(x, self._dropped(self.contract(relu_squared(self.expand(unit_rms(x))))))

    def _dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, c: FastConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.qk_norm, self.scale, self.layer = c.n_heads, c.qk_norm, c.attention_scale, layer
        self.qkv = FusedLinear(c.d_model, (c.d_model // c.n_heads,) * (3 * c.n_heads), spans=(c.d_model,) * 3)
        self.output = nn.Linear(c.d_model, c.d_model, bias=False)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], extra: Tensor | None, seen: Visible, cache: KVCache | None
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, E)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        qk = rotate(unit_rms(qk) if self.qk_norm else qk, tables)
        if extra is not None:
            v = v + extra.view_as(v)
        return self.output(attend_behind(qk[:, :, 0], qk[:, :, 1], v, seen, cache, self.layer, self.scale))
