"""The Transformer (Vaswani et al. 2017): an encoder that reads both ways and a decoder that reads it and writes.

As published: sinusoidal positions, embeddings times sqrt(D) that are the head's weight too (section 3.4), LayerNorm
after each residual sum, ReLU, biases. By options it is BART (Lewis et al. 2020, section 2.1: learned positions, a norm
on the embeddings, GELU), Marian's Transformer (Junczys-Dowmunt et al. 2018: swish, a bias of the logits), or one with
the norms first.

Shapes: B rows, S positions of the encoder, U of the decoder, H heads, E numbers a head, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import Family, UserError
from lmexp.model.kv_cache import Across, CrossCache, Visible, see_across, visible
from lmexp.model.layers import (
    FusedLinear,
    Head,
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

POSITIONS = ("sinusoidal", "sinusoidal_halves", "learned")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu}


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a Transformer."""

    family: ClassVar[Family] = "encoder_decoder"

    n_layers: int
    """Blocks of the encoder."""

    n_heads: int
    """Attention heads of a block; divides `d_model`."""

    d_model: int
    """Width of the residual stream; even for sinusoidal positions."""

    max_length: int
    """Longest text in tokens, of the encoder and of the decoder: the rows of the position tables."""

    n_decoder_layers: int | None = None
    """Blocks of the decoder; null: `n_layers`."""

    d_ff: int | None = None
    """Width inside the feed-forward; null: 4 * d_model."""

    prenorm: bool = False
    """Norm before each sublayer and at the end of both stacks; false: after each residual sum, as published."""

    positions: Literal["sinusoidal", "sinusoidal_halves", "learned"] = "sinusoidal"
    """`sinusoidal`: sine and cosine take turns (section 3.5); `sinusoidal_halves`: all sines, then all cosines
    (Marian); `learned`: a table for the encoder and one for the decoder (BART)."""

    scale_embedding: bool = True
    """Embeddings are multiplied by sqrt(d_model) (section 3.4)."""

    embedding_norm: bool = False
    """LayerNorm on the sum of embeddings and positions (BART)."""

    activation: Literal["relu", "gelu", "swish"] = "relu"
    """Between the two matrices of the feed-forward."""

    tied: bool = True
    """One matrix is both embeddings and the head (section 3.4); false: three matrices."""

    head_bias: bool = False
    """A bias of the logits (Marian)."""

    dropout: float = 0.1
    """Share of numbers dropped from embeddings and sublayer outputs in training (section 5.4); in [0, 1)."""

    attention_dropout: float = 0.0
    """Share of attention weights dropped in training; in [0, 1)."""

    activation_dropout: float = 0.0
    """Share of numbers dropped inside the feed-forward in training; in [0, 1)."""

    copy_init: bool = False
    """Cross-attention begins by passing on what it looks at, unchanged: its values and its output are identities. With
    `tied` and `prenorm` the words of the source are then likely from the start, which is what summaries need."""

    init_std: float | None = None
    """Standard deviation of all matrices at the start; null: as the authors' tensor2tensor does, Xavier's uniform, and
    1/sqrt(d_model) for the tables that are looked up and the head."""

    decoder_start_id: int = 0
    """The token id that the decoder's input begins with; at least 0 and less than the vocabulary."""

    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this; 64 or 128 suits GPUs."""

    def __post_init__(self) -> None:
        check_positive(
            "model",
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            max_length=self.max_length,
            n_decoder_layers=self.decoder_layers,
            d_ff=self.ff_width,
            init_std=1.0 if self.init_std is None else self.init_std,
            vocab_multiple=self.vocab_multiple,
        )
        check_heads("model", self.d_model, self.n_heads)
        check_fraction(
            "model",
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
        )
        for key, value, choices in (
            ("positions", self.positions, POSITIONS),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in choices:
                raise UserError(f"model.{key}={value}; expected one of {', '.join(choices)}.")
        if self.positions != "learned" and self.d_model % 2:
            raise UserError(
                f"model.d_model={self.d_model} is odd; sinusoidal positions need an even one: change it, or set "
                "model.positions=learned."
            )
        check_start_id(self.decoder_start_id)

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    def build(self, vocab_size: int) -> Transformer:
        """The model at random weights for token ids below `vocab_size`."""
        check_start_id(self.decoder_start_id, vocab_size)
        return Transformer(self, round_up(vocab_size, self.vocab_multiple))


class Transformer(nn.Module):
    """Tokens (B, S) and decoder tokens (B, U) int64 to hidden states (B, U, D); `head` makes logits and losses."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        c = self.config = config
        self.vocab_size, self.max_length, self.n_layers = vocab_size, c.max_length, c.n_layers
        self.family, self.decoder_start_id = c.family, c.decoder_start_id
        self.embed = nn.Embedding(vocab_size, c.d_model)
        self.decoder_embed = self.embed if c.tied else nn.Embedding(vocab_size, c.d_model)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.head = Head(c.d_model, vocab_size, tied=self.embed if c.tied else None, bias=c.head_bias)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """By `init_std`; biases zero. Fused projections are drawn one by one, so that fusing changes no range."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Embedding, Head)):
                module.weight.normal_(std=std or self.config.d_model**-0.5)
            elif isinstance(module, nn.Linear):
                for part in module.weight.split(getattr(module, "parts", module.out_features)):
                    part.normal_(std=std) if std else nn.init.xavier_uniform_(part)
                module.bias.zero_()
        if self.config.copy_init:
            identity = torch.eye(self.config.d_model)
            for module in self.modules():
                if isinstance(module, CrossAttention):
                    module.kv.weight[self.config.d_model :] = identity
                    module.output.weight.copy_(identity)

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
        places instead of 0, 1, ...
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
        cache: CrossCache | None = None,
    ) -> Tensor:
        """Hidden states (B, U, D) of the decoder over the encoder's `memory` (B, S, D).

        `documents` (B, S) of the encoder and `decoder_documents` (B, U): a token sees those before it of its own
        document, and the encoder's document of the same number; where only one of the two is given, all on the other
        side is document 0. `decoder_positions` (B, U): places instead of 0, 1, ... `cache`: `decoder_tokens`
        follow what it holds, and are added to it; it belongs to one `memory`, which may be
        read by several rows each (`CrossCache`).
        """
        seen = visible(decoder_tokens, decoder_documents, cache)
        across = see_across(memory, documents, decoder_documents, cache)
        return self.decoder(self.decoder_embed(decoder_tokens), memory, seen, across, decoder_positions, cache)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a training step for each token read, of encoder and decoder, both with texts of `length` tokens.

        A pair of tokens, one on each side, meets every matrix once: 6 FLOPs a parameter that is multiplied, and
        12 * length * D for each of the attentions (encoder self, decoder self, cross); `training_flops` of a pair,
        halved. Where the two sides are not equally long this is off, as the decoder's tokens cost more.
        """
        c = self.config
        lookups = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        if c.tied:
            lookups -= self.embed.weight.numel()  # the head multiplies with it
        return training_flops(self, lookups, c.d_model, c.n_layers + 2 * c.decoder_layers, length) / 2

    def new_cache(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> CrossCache:
        """An empty cache for `length` decoder positions of `batch` rows."""
        c = self.config
        return CrossCache(c.decoder_layers, batch, c.n_heads, length, c.d_model // c.n_heads, device, dtype)


class Entry(nn.Module):
    """What a stack begins with: embeddings, scaled, plus positions, maybe normed, with dropout."""

    table: Tensor

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(c.d_model) if c.scale_embedding else 1.0
        self.dropout, self.max_length = c.dropout, c.max_length
        self.position = nn.Embedding(c.max_length, c.d_model) if c.positions == "learned" else None
        if self.position is None:  # no part of the state dict
            table = sinusoids(c.max_length, c.d_model, halves=c.positions == "sinusoidal_halves")
            self.register_buffer("table", table, persistent=False)
        self.norm = nn.LayerNorm(c.d_model) if c.embedding_norm else nn.Identity()

    def forward(self, x: Tensor, start: int, positions: Tensor | None) -> Tensor:
        """x (B, T, D) at places `start`, `start` + 1, ... or `positions` (B, T)."""
        end = start + x.shape[1]
        assert end <= self.max_length, f"{end} positions, the model has {self.max_length}"
        table = self.table if self.position is None else self.position.weight
        place = table[start:end] if positions is None else F.embedding(positions, table)
        return dropped(self.norm(x * self.scale + place), self.dropout, self.training)


def sinusoids(length: int, d_model: int, halves: bool) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / D)), PE(pos, 2i + 1) = cos(same) (section 3.5), float32 (length, D).

    `halves`: all sines first, then all cosines.
    """
    frequency = 10_000 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # (length, D/2)
    waves = (angle.sin(), angle.cos())
    return (torch.cat(waves, -1) if halves else torch.stack(waves, -1).flatten(-2)).float()


class Encoder(nn.Module):
    """Embeddings (B, S, D) to what the decoder reads (B, S, D)."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.entry = Entry(c)
        self.blocks = nn.ModuleList(EncoderBlock(c) for _ in range(c.n_layers))
        self.norm = nn.LayerNorm(c.d_model) if c.prenorm else nn.Identity()

    def forward(self, x: Tensor, seen: Visible, positions: Tensor | None) -> Tensor:
        x = self.entry(x, 0, positions)
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(x)


class Decoder(nn.Module):
    """Embeddings (B, U, D) and the encoder's memory (B, S, D) to hidden states (B, U, D)."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.entry = Entry(c)
        self.blocks = nn.ModuleList(DecoderBlock(c, layer) for layer in range(c.decoder_layers))
        self.norm = nn.LayerNorm(c.d_model) if c.prenorm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        seen: Visible,
        across: Across,
        positions: Tensor | None,
        cache: CrossCache | None,
    ) -> Tensor:
        length = x.shape[1]
        x = self.entry(x, 0 if cache is None else cache.length, positions)
        for block in self.blocks:
            x = block(x, memory, seen, across, cache)
        if cache is not None:
            cache.advance(length)
        return self.norm(x)


class EncoderBlock(nn.Module):
    """norm(x + f(x)) with f self-attention, then the feed-forward; or x + f(norm(x))."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.prenorm = c.prenorm
        self.attention = SelfAttention(c)
        self.norm1 = nn.LayerNorm(c.d_model)
        self.mlp = MLP(c)
        self.norm2 = nn.LayerNorm(c.d_model)

    def forward(self, x: Tensor, seen: Visible) -> Tensor:
        if self.prenorm:
            x = residual(x, self.attention(self.norm1(x), seen))
            return residual(x, self.mlp(self.norm2(x)))
        x = self.norm1(x + self.attention(x, seen))
        return self.norm2(x + self.mlp(x))


class DecoderBlock(nn.Module):
    """As the encoder's, with cross-attention between the two."""

    def __init__(self, c: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.prenorm = c.prenorm
        self.attention = SelfAttention(c, layer)
        self.norm1 = nn.LayerNorm(c.d_model)
        self.cross = CrossAttention(c, layer)
        self.norm2 = nn.LayerNorm(c.d_model)
        self.mlp = MLP(c)
        self.norm3 = nn.LayerNorm(c.d_model)

    def forward(self, x: Tensor, memory: Tensor, seen: Visible, across: Across, cache: CrossCache | None) -> Tensor:
        if self.prenorm:
            x = residual(x, self.attention(self.norm1(x), seen, cache))
            x = residual(x, self.cross(self.norm2(x), memory, across, cache))
            return residual(x, self.mlp(self.norm3(x)))
        x = self.norm1(x + self.attention(x, seen, cache))
        x = self.norm2(x + self.cross(x, memory, across, cache))
        return self.norm3(x + self.mlp(x))


class SelfAttention(nn.Module):
    """Multi-head attention of a text to itself (section 3.2)."""

    def __init__(self, c: TransformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.n_heads, self.layer, self.dropout, self.weight_dropout = c.n_heads, layer, c.dropout, c.attention_dropout
        self.qkv = FusedLinear(c.d_model, (c.d_model,) * 3, bias=True)
        self.output = nn.Linear(c.d_model, c.d_model)

    def forward(self, x: Tensor, seen: Visible, cache: CrossCache | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, E)
        dropout = self.weight_dropout if self.training else 0.0
        mixed = attend_to_self(qkv, seen, cache, self.layer, dropout)  # (B, T, D)
        return dropped(self.output(mixed), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Multi-head attention of the decoder to the encoder's memory (section 3.2.3)."""

    def __init__(self, c: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.layer, self.dropout, self.weight_dropout = c.n_heads, layer, c.dropout, c.attention_dropout
        self.q = nn.Linear(c.d_model, c.d_model)
        self.kv = FusedLinear(c.d_model, (c.d_model,) * 2, bias=True)
        self.output = nn.Linear(c.d_model, c.d_model)

    def forward(self, x: Tensor, memory: Tensor, across: Across, cache: CrossCache | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.n_heads, -1))  # (B, U, H, E)
        dropout = self.weight_dropout if self.training else 0.0
        mixed = attend_to_memory(q, self.kv, memory, across, cache, self.layer, dropout)  # (B, U, D)
        return dropped(self.output(mixed), self.dropout, self.training)


class MLP(nn.Module):
    """activation(x W1 + b1) W2 + b2 (section 3.3, eq. 2)."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.activation, self.dropout, self.inner_dropout = ACTIVATIONS[c.activation], c.dropout, c.activation_dropout
        self.expand = nn.Linear(c.d_model, c.ff_width)
        self.contract = nn.Linear(c.ff_width, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        inner = dropped(self.activation(self.expand(x)), self.inner_dropout, self.training)  # (B, T, d_ff)
        return dropped(self.contract(inner), self.dropout, self.training)
