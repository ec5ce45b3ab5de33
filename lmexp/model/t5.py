"""T5 (Raffel et al. 2020, section 2.1) and T5 v1.1 (Shazeer 2020; `released_checkpoints.md` of its authors).

An encoder that reads both ways and a decoder that reads it and writes, with relative positions: each head adds a
learned number to its attention scores, one for each bucket of distances. RMSNorm before each sublayer and at the end of
both stacks, no biases, scores that are not divided by sqrt(E). v1.0: ReLU, and a head tied to the embeddings. v1.1: a
feed-forward gated by GELU, and a head of its own.

Shapes: B rows, S positions of the encoder, U of the decoder, T queries, K keys, H heads, E numbers a head, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import Family, UserError
from lmexp.model.kv_cache import Across, CrossCache, Visible, see_across, visible
from lmexp.model.layers import (
    FusedLinear,
    Head,
    RMSNorm,
    attend_to_memory,
    attend_to_self,
    check_fraction,
    check_heads,
    check_positive,
    check_start_id,
    dropped,
    residual,
    round_up,
    training_flops,
)


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5."""

    family: ClassVar[Family] = "encoder_decoder"

    n_layers: int
    """Blocks of the encoder."""

    n_heads: int
    """Attention heads of a block."""

    d_model: int
    """Width of the residual stream."""

    d_ff: int
    """Width inside the feed-forward."""

    n_decoder_layers: int | None = None
    """Blocks of the decoder; null: `n_layers`."""

    d_kv: int | None = None
    """Width of a head; null: d_model / n_heads."""

    gated: bool = False
    """The feed-forward is gelu(x W1) * (x W3) W2, of three matrices, as in v1.1; false: relu(x W1) W2."""

    tied: bool = True
    """The head is the embedding, and what it is given is divided by sqrt(d_model); false: a matrix of its own, as in
    v1.1."""

    max_length: int = 512
    """Longest text in tokens, of the encoder and of the decoder, that data and generation may ask for. The weights do
    not depend on it."""

    n_buckets: int = 32
    """Buckets of distances; even, at least 4. In the encoder half of them are for each direction."""

    max_distance: int = 128
    """Distances from here on share the last bucket; more than `n_buckets` / 2."""

    dropout: float = 0.1
    """Share of numbers dropped from embeddings, attention weights, inside the feed-forward, from sublayer outputs and
    from the stacks' outputs in training; in [0, 1)."""

    norm_eps: float = 1e-6
    """Added to the mean square in norms."""

    decoder_start_id: int = 0
    """The token id that the decoder's input begins with, the padding's in T5; at least 0 and less than the
    vocabulary."""

    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this; 64 or 128 suits GPUs."""

    def __post_init__(self) -> None:
        check_positive(
            "model",
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            d_ff=self.d_ff,
            n_decoder_layers=self.decoder_layers,
            d_kv=1 if self.d_kv is None else self.d_kv,
            max_length=self.max_length,
            norm_eps=self.norm_eps,
            vocab_multiple=self.vocab_multiple,
        )
        if self.d_kv is None:
            check_heads("model", self.d_model, self.n_heads)
        check_fraction("model", dropout=self.dropout)
        if self.n_buckets < 4 or self.n_buckets % 2:
            raise UserError(f"model.n_buckets={self.n_buckets}; expected an even number of at least 4.")
        if self.max_distance <= self.n_buckets // 2:
            raise UserError(
                f"model.max_distance={self.max_distance}; expected more than half of n_buckets={self.n_buckets}, whose "
                "first half are distances of their own."
            )
        check_start_id(self.decoder_start_id)

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers

    @property
    def head_width(self) -> int:
        """Numbers of a query, key or value."""
        return self.d_model // self.n_heads if self.d_kv is None else self.d_kv

    def build(self, vocab_size: int) -> T5:
        """The model at random weights for token ids below `vocab_size`."""
        check_start_id(self.decoder_start_id, vocab_size)
        return T5(self, round_up(vocab_size, self.vocab_multiple))


class T5(nn.Module):
    """Tokens (B, S) and decoder tokens (B, U) int64 to hidden states (B, U, D); `head` makes logits and losses."""

    def __init__(self, config: T5Config, vocab_size: int) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_length, self.n_layers = vocab_size, c.max_length, c.n_layers
        self.family, self.decoder_start_id = c.family, c.decoder_start_id
        self.embed = nn.Embedding(vocab_size, c.d_model)
        self.encoder = Stack(c, c.n_layers, decoder=False)
        self.decoder = Stack(c, c.decoder_layers, decoder=True)
        self.head = Head(c.d_model, vocab_size, tied=self.embed if c.tied else None)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal with deviation 1/sqrt(inputs), as the authors' Mesh TensorFlow.

        Embeddings have 1; queries 1/sqrt(D E), which is where the scores' missing scale went; the position biases
        1/sqrt(D). The logits begin with a deviation of 1, tied or not.
        """
        c = self.config
        narrow = c.d_model**-0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, (nn.Embedding, Head)):
                module.weight.normal_(std=narrow)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.qkv.weight[: module.qkv.parts[0]] *= c.head_width**-0.5
            elif isinstance(module, CrossAttention):
                module.q.weight *= c.head_width**-0.5
        self.embed.weight.normal_()  # after the head, which may be the same

    def forward(
        self,
        tokens: Tensor,
        decoder_tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        decoder_positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, U, D) of the decoder; the arguments are those of `encode` and `decode`."""
        memory = self.encode(tokens, documents, positions)
        return self.decode(decoder_tokens, memory, documents, decoder_documents, decoder_positions)

    def encode(self, tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What the decoder reads, (B, S, D).

        `documents` (B, S): tokens see those of their own document only; padding is document -1. `positions` (B, S):
        distances are their differences; without, those of columns.
        """
        mask = None if documents is None else (documents[:, None, :, None] == documents[:, None, None, :])
        return self.encoder(self.embed(tokens), Visible(mask, causal=False), positions)

    def decode(
        self,
        decoder_tokens: Tensor,
        memory: Tensor,
        documents: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        decoder_positions: Tensor | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        """Hidden states (B, U, D) of the decoder over the encoder's `memory` (B, S, D), scaled for the head.

        `documents` (B, S) of the encoder and `decoder_documents` (B, U): a token sees those before it of its own
        document, and the encoder's document of the same number, which may be missing; where only one of the two is
        given, all on the other side is document 0. `decoder_positions` (B, U): distances are their differences.
        `cache`: `decoder_tokens` follow what it holds, and are added to it; it belongs to one `memory`,
        which may be read by several rows each (`CrossCache`).
        """
        seen = visible(decoder_tokens, decoder_documents, cache)
        across = see_across(memory, documents, decoder_documents, cache)
        x = self.decoder(self.embed(decoder_tokens), seen, decoder_positions, memory, across, cache)
        return x * self.config.d_model**-0.5 if self.config.tied else x

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a training step for each token read, of encoder and decoder, both with texts of `length` tokens.

        A pair of tokens, one on each side, meets every matrix once: 6 FLOPs a parameter that is multiplied, and
        12 * length * H E for each of the attentions (encoder self, decoder self, cross); `training_flops` of a pair,
        halved. Where the two sides are not equally long this is off, as the decoder's tokens cost more.
        """
        c = self.config
        lookups = self.encoder.bias.table.weight.numel() + self.decoder.bias.table.weight.numel()
        if not c.tied:  # a tied one is multiplied as the head
            lookups += self.embed.weight.numel()
        return training_flops(self, lookups, c.n_heads * c.head_width, c.n_layers + 2 * c.decoder_layers, length) / 2

    def new_cache(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> T5Cache:
        """An empty cache for `length` decoder positions of `batch` rows."""
        c = self.config
        return T5Cache(c.decoder_layers, batch, c.n_heads, length, c.head_width, device, dtype)


class T5Cache(CrossCache):
    """And the `decoder_positions` of what it holds, (B, U), if they were given."""

    positions: Tensor | None = None
    past: Tensor | None = None
    """What `RelativeBias.past` gives, once they go on token by token."""

    def select(self, rows: Sequence[int]) -> Tensor | None:
        assert self.positions is None, "rows that are selected have no positions of their own"
        return super().select(rows)


class Stack(nn.Module):
    """Embeddings (B, T, D) to normed hidden states (B, T, D): the encoder, or the decoder over a memory (B, S, D)."""

    def __init__(self, c: T5Config, n_layers: int, decoder: bool) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.bias = RelativeBias(c, both_ways=not decoder)
        self.blocks = nn.ModuleList(Block(c, layer, decoder) for layer in range(n_layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)

    def forward(
        self,
        x: Tensor,
        seen: Visible,
        positions: Tensor | None,
        memory: Tensor | None = None,
        across: Across | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        length = x.shape[1]
        start = 0 if cache is None else cache.length
        keys = positions
        if cache is not None and positions is not None:
            assert start == 0 or cache.positions is not None, "the cached tokens were given no positions"
            keys = positions if cache.positions is None else torch.cat((cache.positions, positions), 1)
            cache.positions = keys
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        past = None
        if cache is not None and length == 1 and positions is None:  # token by token
            past = cache.past = self.bias.past() if cache.past is None else cache.past
            if cache.places is None:
                keys = torch.arange(start + 1, device=x.device)[None]
            else:  # selected rows: keys may stand in any column
                assert seen.mask is not None
                keys = cache.places[:, : seen.mask.shape[-1]]
        scores = self.bias(start, length, positions, keys, past)  # the same for all layers, made once
        seen = _add_bias(seen, scores, dtype)
        x = dropped(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, seen, memory, across, cache)
        if cache is not None:
            cache.advance(length)
        return dropped(self.norm(x), self.dropout, self.training)


def _add_bias(seen: Visible, bias: Tensor, dtype: torch.dtype) -> Visible:
    """`seen` as what is added to the scores: `bias` (B or 1, H, T, K), and minus infinity where nothing may be seen."""
    mask = seen.mask
    if mask is not None and mask.dtype != torch.bool:
        return Visible((bias + mask).to(dtype), causal=False)
    if seen.causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf)
    return Visible(bias.to(dtype), causal=False)


class RelativeBias(nn.Module):
    """What is added to the score of a query and a key, by head and bucket of their distance (section 2.1).

    Half of a direction's buckets are for one distance each, the other half for ranges that grow logarithmically up to
    `max_distance`; all distances from there on share the last one.
    """

    buckets: Tensor
    heads_dim = 1
    """The dimension of what it gives that is shared out with the heads (`tensor_parallel`)."""

    def __init__(self, c: T5Config, both_ways: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(c.n_buckets, c.n_heads)
        self.both_ways, self.max_distance = both_ways, c.max_distance
        n = self.each = c.n_buckets // 2 if both_ways else c.n_buckets  # buckets of a direction
        exact = n // 2
        distance = torch.arange(c.max_distance + 1)
        growth = (distance.clamp_min(1).double() / exact).log() / math.log(c.max_distance / exact)
        far = (exact + (growth * (n - exact)).long()).clamp_max(n - 1)
        # no part of the state dict
        self.register_buffer("buckets", torch.where(distance < exact, distance, far), persistent=False)

    def bucket(self, relative: Tensor) -> Tensor:
        """The bucket, int64, of key position minus query position, int64 of any shape."""
        distance = relative.abs() if self.both_ways else -relative.clamp_max(0)
        bucket = self.buckets[distance.clamp_max(self.max_distance)]
        return bucket + self.each * (relative > 0) if self.both_ways else bucket

    def forward(
        self,
        start: int,
        length: int,
        positions: Tensor | None,
        keys: Tensor | None,
        past: Tensor | None = None,
    ) -> Tensor:
        """(1, H, T, K) for queries `start`, ..., `start + length - 1` and keys from 0 on, or (B, H, T, K) for queries
        at `positions` (B, T) and keys at `keys` (B, K), or (B, H, 1, K) for a query at `start` and keys at `keys`, none
        of which is later, looked up in what `past` gave."""
        if past is not None:
            assert keys is not None
            return F.embedding((start - keys).clamp_max(self.max_distance), past).permute(0, 2, 1)[:, :, None]
        if positions is not None and keys is not None:
            relative = keys[:, None, :] - positions[:, :, None]  # (B, T, K)
            bias: Tensor = self.table(self.bucket(relative)).permute(0, 3, 1, 2)
            return bias
        # a number for each distance, looked up once; a query's row is a window on them, one further left for the next
        end = start + length
        relative = torch.arange(1 - end, length, device=self.table.weight.device)
        windows: Tensor = self.table(self.bucket(relative)).T.unfold(-1, end, 1)  # (H, T, K), the last query first
        return windows.flip(1)[None]

    def past(self) -> Tensor:
        """Of a query's own position, of the one before it, and so on up to `max_distance`, (max_distance + 1, H)."""
        past: Tensor = self.table(self.bucket(-torch.arange(self.max_distance + 1, device=self.table.weight.device)))
        return past


class Block(nn.Module):
    """x + attention(norm(x)), in the decoder x + cross(norm(x), memory), then x + mlp(norm(x))."""

    def __init__(self, c: T5Config, layer: int, decoder: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c.d_model, c.norm_eps)
        self.attention = SelfAttention(c, layer)
        if decoder:
            self.norm_cross = RMSNorm(c.d_model, c.norm_eps)
            self.cross = CrossAttention(c, layer)
        self.norm2 = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, seen: Visible, memory: Tensor | None, across: Across | None, cache: T5Cache | None
    ) -> Tensor:
        x = residual(x, self.attention(self.norm1(x), seen, cache))
        if memory is not None and across is not None:
            x = residual(x, self.cross(self.norm_cross(x), memory, across, cache))
        return residual(x, self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    """Multi-head attention of a text to itself; the position biases stand in `seen`."""

    def __init__(self, c: T5Config, layer: int) -> None:
        super().__init__()
        self.n_heads, self.layer, self.dropout = c.n_heads, layer, c.dropout
        self.qkv = FusedLinear(c.d_model, (c.n_heads * c.head_width,) * 3)
        self.output = nn.Linear(c.n_heads * c.head_width, c.d_model, bias=False)

    def forward(self, x: Tensor, seen: Visible, cache: T5Cache | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, E)
        mixed = attend_to_self(qkv, seen, cache, self.layer, self.dropout if self.training else 0.0, scale=1.0)
        return dropped(self.output(mixed), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Multi-head attention of the decoder to the encoder's memory, without positions."""

    def __init__(self, c: T5Config, layer: int) -> None:
        super().__init__()
        self.n_heads, self.layer, self.dropout = c.n_heads, layer, c.dropout
        self.q = nn.Linear(c.d_model, c.n_heads * c.head_width, bias=False)
        self.kv = FusedLinear(c.d_model, (c.n_heads * c.head_width,) * 2)
        self.output = nn.Linear(c.n_heads * c.head_width, c.d_model, bias=False)

    def forward(self, x: Tensor, memory: Tensor, across: Across, cache: T5Cache | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.n_heads, -1))  # (B, U, H, E)
        dropout = self.dropout if self.training else 0.0
        mixed = attend_to_memory(q, self.kv, memory, across, cache, self.layer, dropout, scale=1.0)  # (B, U, H * E)
        return dropped(self.output(mixed), self.dropout, self.training)


class MLP(nn.Module):
    """relu(x W1) W2, or gelu(x W1) * (x W3) W2 (Shazeer 2020, eq. 6), with W1 and W3 in one product."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.gated, self.dropout = c.gated, c.dropout
        self.expand = FusedLinear(c.d_model, (c.d_ff,) * (2 if c.gated else 1))
        self.contract = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)  # (B, T, d_ff), gated twice as wide
        if self.gated:
            gate, value = inner.chunk(2, -1)
            inner = F.gelu(gate, approximate="tanh") * value
        else:
            inner = F.relu(inner, inplace=True)  # nothing else reads what it writes over
        inner = dropped(inner, self.dropout, self.training)
        return dropped(self.contract(inner), self.dropout, self.training)
