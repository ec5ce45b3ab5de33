"""GPT-2 (Radford et al. 2019, section 2.3) and, at its sizes, GPT-3 (Brown et al. 2020, section 2.1).

A decoder with learned positions, LayerNorm before each sublayer and at the end, biases, GELU, and a head tied to the
token embedding. GPT-3 differs in that half of its layers attend to a local band; here all are dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import Family
from lmexp.model.kv_cache import KVCache, Visible, visible
from lmexp.model.layers import (
    FusedLinear,
    Head,
    attend_to_self,
    check_fraction,
    check_heads,
    check_positive,
    dropped,
    residual,
    round_up,
    training_flops,
)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT."""

    family: ClassVar[Family] = "decoder"

    n_layers: int
    """Blocks of attention and feed-forward."""

    n_heads: int
    """Attention heads of a block; divides `d_model`."""

    d_model: int
    """Width of the residual stream."""

    max_length: int
    """Longest context in tokens: the rows of the position table."""

    dropout: float = 0.0
    """Share of numbers dropped from embeddings, attention weights and sublayer outputs in training; in [0, 1)."""

    bias: bool = True
    """Biases in linear layers and norms, as published; without is a little faster."""

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
        )
        check_heads("model", self.d_model, self.n_heads)
        check_fraction("model", dropout=self.dropout)

    def build(self, vocab_size: int) -> GPT:
        """The model at random weights for token ids below `vocab_size`."""
        return GPT(self, round_up(vocab_size, self.vocab_multiple))


class GPT(nn.Module):
    """Tokens (B, T) int64 to hidden states (B, T, D); `head` turns these into logits and losses."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_length, self.n_layers = vocab_size, c.max_length, c.n_layers
        self.family = c.family
        self.embed = nn.Embedding(vocab_size, c.d_model)
        self.position = nn.Embedding(c.max_length, c.d_model)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = nn.LayerNorm(c.d_model, bias=c.bias)
        self.head = Head(c.d_model, vocab_size, tied=self.embed)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal(0, 0.02), the projections back into the residual stream over sqrt(2 L) (Radford et al., 2.3)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("output.weight", "contract.weight"))
                p.normal_(std=0.02 / math.sqrt(2 * self.n_layers) if residual else 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D).

        `documents` (B, T): attention stops where they change. `positions` (B, T): rows of the position table instead
        of 0, 1, ... `cache`: `tokens` follow what it holds, and are added to it. `prefix` (B,): so many first
        positions see one another both ways.
        """
        length = tokens.shape[1]
        start = 0 if cache is None else cache.length
        assert start + length <= self.max_length, f"{start + length} positions, the model has {self.max_length}"
        seen = visible(tokens, documents, cache, prefix)
        place = self.position.weight[start : start + length] if positions is None else self.position(positions)
        x = dropped(self.embed(tokens) + place, self.config.dropout, self.training)  # (B, T, D)
        for block in self.blocks:
            x = block(x, seen, cache)
        if cache is not None:
            cache.advance(length)
        return self.norm(x)

    def flops_per_token(self, length: int) -> float:
        """FLOPs a token of a training step at context `length`; see `training_flops`."""
        return training_flops(self, self.position.weight.numel(), self.config.d_model, self.n_layers, length)

    def new_cache(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `length` positions of `batch` sequences."""
        c = self.config
        return KVCache(c.n_layers, batch, c.n_heads, length, c.d_model // c.n_heads, device, dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.d_model, bias=c.bias)
        self.attention = Attention(c, layer)
        self.norm2 = nn.LayerNorm(c.d_model, bias=c.bias)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, seen: Visible, cache: KVCache | None) -> Tensor:
        x = residual(x, self.attention(self.norm1(x), seen, cache))
        return residual(x, self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.layer = c.n_heads, c.dropout, layer
        self.qkv = FusedLinear(c.d_model, (c.d_model,) * 3, bias=c.bias)
        self.output = nn.Linear(c.d_model, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, seen: Visible, cache: KVCache | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, E)
        mixed = attend_to_self(qkv, seen, cache, self.layer, self.dropout if self.training else 0.0)  # (B, T, D)
        return dropped(self.output(mixed), self.dropout, self.training)


class MLP(nn.Module):
    """gelu(x W1) W2, four times as wide inside."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.expand = nn.Linear(c.d_model, 4 * c.d_model, bias=c.bias)
        self.contract = nn.Linear(4 * c.d_model, c.d_model, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.expand(x), approximate="tanh")  # (B, T, 4 D)
        return dropped(self.contract(inner), self.dropout, self.training)
