"""Llama (Touvron et al. 2023, section 2.2; grouped queries as in Llama 2 and 3, 2023-24), and Qwen2 and Qwen3.

A decoder with rotary positions, RMSNorm before each sublayer and at the end, a SwiGLU feed-forward (Shazeer 2020,
eq. 6), no biases, and queries that may share keys and values in groups (Ainslie et al. 2023). Qwen2 (Yang et al. 2024,
section 2.2.1) has biases in the projections to queries, keys and values; Qwen3 (Yang et al. 2025, section 2) norms
queries and keys instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import Family, UserError
from lmexp.model.kv_cache import KVCache, Visible, visible
from lmexp.model.layers import (
    FusedLinear,
    Head,
    RMSNorm,
    Rotary,
    attend_behind,
    check_heads,
    check_positive,
    residual,
    rotate,
    round_up,
    training_flops,
)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama."""

    family: ClassVar[Family] = "decoder"

    n_layers: int
    """Blocks of attention and feed-forward."""

    n_heads: int
    """Query heads of a block; divides `d_model` unless `d_head` is given."""

    d_model: int
    """Width of the residual stream."""

    d_ff: int
    """Width inside the feed-forward."""

    max_length: int
    """Longest context in tokens: the rows of the rotary tables."""

    n_kv_heads: int | None = None
    """Key and value heads, a divisor of `n_heads`; null: as many."""

    d_head: int | None = None
    """Width of a head, even; null: d_model / n_heads."""

    tied: bool = False
    """One matrix is both embedding and head."""

    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths: the longest is 2 pi * theta positions."""

    rope_scaling: Mapping[str, float] | None = None
    """How Llama 3.1 stretches long wavelengths, the four numbers of `SCALING_KEYS`; null: not at all."""

    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values (Qwen2)."""

    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before they are rotated, its weights shared by the heads (Qwen3)."""

    norm_eps: float = 1e-5
    """Added to the mean square in norms."""

    init_std: float = 0.02
    """Standard deviation of all matrices at the start."""

    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this; 64 or 128 suits GPUs."""

    def __post_init__(self) -> None:
        check_positive(
            "model",
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            d_ff=self.d_ff,
            max_length=self.max_length,
            n_kv_heads=self.kv_heads,
            d_head=1 if self.d_head is None else self.d_head,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            init_std=self.init_std,
            vocab_multiple=self.vocab_multiple,
        )
        if self.d_head is None:
            check_heads("model", self.d_model, self.n_heads)
        if self.n_heads % self.kv_heads:
            raise UserError(f"model.n_kv_heads={self.n_kv_heads}; expected a divisor of n_heads={self.n_heads}.")
        if self.rope_scaling is not None:
            _check_scaling(self.rope_scaling)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Numbers a head."""
        return self.d_head or self.d_model // self.n_heads

    def build(self, vocab_size: int) -> Llama:
        """The model at random weights for token ids below `vocab_size`."""
        return Llama(self, round_up(vocab_size, self.vocab_multiple))


SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Keys of `rope_scaling`, named as in Llama 3.1's own files."""


def _check_scaling(scaling: Mapping[str, float]) -> None:
    if set(scaling) != set(SCALING_KEYS):
        raise UserError(f"model.rope_scaling={dict(scaling)}; expected the keys {', '.join(SCALING_KEYS)}, or null.")
    check_positive("model.rope_scaling", **scaling)
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"model.rope_scaling.low_freq_factor={scaling['low_freq_factor']}; expected less than "
            f"high_freq_factor={scaling['high_freq_factor']}."
        )


class Llama(nn.Module):
    """Tokens (B, T) int64 to hidden states (B, T, D); `head` turns these into logits and losses."""

    def __init__(self, config: LlamaConfig, vocab_size: int) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_length, self.n_layers = vocab_size, c.max_length, c.n_layers
        self.family = c.family
        self.embed = nn.Embedding(vocab_size, c.d_model)
        self.rotary = (
            Rotary(c.head_width, c.max_length, c.rope_theta)
            if c.rope_scaling is None
            else ScaledRotary(c.head_width, c.max_length, c.rope_theta, c.rope_scaling)
        )
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = Head(c.d_model, vocab_size, tied=self.embed if c.tied else None)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    p.normal_(std=c.init_std)
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

        `documents` (B, T): attention stops where they change. `positions` (B, T): instead of 0, 1, ...
        `cache`: `tokens` follow what it holds, and are added to it. `prefix` (B,): so many first positions see
        one another both ways.
        """
        length = tokens.shape[1]
        start = 0 if cache is None else cache.length
        assert start + length <= self.max_length, f"{start + length} positions, the model has {self.max_length}"
        seen = visible(tokens, documents, cache, prefix)
        x = self.embed(tokens)  # (B, T, D)
        tables = self.rotary.tables(start, length, positions, x.dtype)
        for block in self.blocks:
            x = block(x, tables, seen, cache)
        if cache is not None:
            cache.advance(length)
        return self.norm(x)

    def flops_per_token(self, length: int) -> float:
        """FLOPs a token of a training step at context `length`; see `training_flops`."""
        c = self.config
        lookups = 0 if c.tied else self.embed.weight.numel()
        return training_flops(self, lookups, c.n_heads * c.head_width, c.n_layers, length)

    def new_cache(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `length` positions of `batch` sequences."""
        c = self.config
        return KVCache(c.n_layers, batch, c.kv_heads, length, c.head_width, device, dtype)


class ScaledRotary(Rotary):
    """Rotary positions whose long wavelengths are stretched for long contexts (Llama 3.1, Grattafiori et al. 2024,
    section 3.4.2; the rule stands in its code, `apply_scaling`).

    With r = original_max_position_embeddings / wavelength, frequencies of r below `low_freq_factor` are divided by
    `factor`, those above `high_freq_factor` stay, and those between are mixed in proportion.
    """

    def __init__(self, d_head: int, max_length: int, theta: float, scaling: Mapping[str, float]) -> None:
        super().__init__(d_head, max_length, theta)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        frequency = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)  # (E/2,)
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / scaling["factor"]
        angle = torch.outer(torch.arange(max_length, dtype=torch.float64), frequency)  # (max_length, E/2)
        self.cos = torch.cat((angle.cos(), angle.cos()), -1).float()
        self.sin = torch.cat((-angle.sin(), angle.sin()), -1).float()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c, layer)
        self.norm2 = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], seen: Visible, cache: KVCache | None) -> Tensor:
        x = residual(x, self.attention(self.norm1(x), tables, seen, cache))
        return residual(x, self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, c: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.d_head = layer, c.head_width
        self.n_heads, self.n_kv_heads = c.n_heads, c.kv_heads
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        spans = tuple(self.d_head * n for n in heads)
        self.qkv = FusedLinear(c.d_model, (self.d_head,) * sum(heads), bias=c.qkv_bias, spans=spans)
        self.q_norm = RMSNorm(self.d_head, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(self.d_head, c.norm_eps) if c.qk_norm else None
        self.output = nn.Linear(self.n_heads * self.d_head, c.d_model, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], seen: Visible, cache: KVCache | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.d_head))  # (B, T, H + 2 K, E)
        qk, v = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.n_heads, self.n_kv_heads), 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        q, k = rotate(qk, tables).split((self.n_heads, self.n_kv_heads), 2)  # (B, T, H or K, E)
        return self.output(attend_behind(q, k, v, seen, cache, self.layer))


class MLP(nn.Module):
    """(silu(x Wg) * x Wu) Wd."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.expand = FusedLinear(c.d_model, (c.d_ff, c.d_ff))
        self.contract = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.expand(x).chunk(2, -1)  # (B, T, F) each
        return self.contract(F.silu(gate) * up)
