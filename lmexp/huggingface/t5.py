"""T5, T5 v1.1 and mT5, which is v1.1 with another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.model import t5

_GATED = {"relu": False, "gated-gelu": True}
"""Their `feed_forward_proj` -> our `gated`."""


class T5(Architecture):
    """`T5ForConditionalGeneration`, of both versions.

    Untied ours are v1.1. There `tie_word_embeddings` false has always meant that the head is not scaled and has weights
    of its own; since Transformers 5 the former is `scale_decoder_outputs`, and the latter can only be seen in the file.
    """

    model_type = "t5"

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **_settings(config),
            "tied": config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
        }

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, t5.T5)

    def config(self, model: t5.T5, vocab_size: int) -> dict[str, Any]:
        c = model.config
        return {
            "model_type": self.model_type,
            "architectures": ["T5ForConditionalGeneration"],
            "vocab_size": vocab_size,
            "n_positions": c.max_length,
            "num_layers": c.n_layers,
            "num_decoder_layers": c.decoder_layers,
            "num_heads": c.n_heads,
            "d_model": c.d_model,
            "d_kv": c.head_width,
            "d_ff": c.d_ff,
            "feed_forward_proj": next(theirs for theirs, gated in _GATED.items() if gated == c.gated),
            "relative_attention_num_buckets": c.n_buckets,
            "relative_attention_max_distance": c.max_distance,
            "dropout_rate": c.dropout,
            "layer_norm_epsilon": c.norm_eps,
            "tie_word_embeddings": c.tied,
            "decoder_start_token_id": c.decoder_start_id,
            "pad_token_id": c.decoder_start_id,  # T5's decoder begins with the padding
            "is_encoder_decoder": True,
        }

    def rules(self, model: t5.T5) -> list[Rule]:
        # the stacks' embeddings are copies of `shared`; of two rules with one name the later one counts
        copies = [f"{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
        head = []
        if model.config.tied:
            copies.append("lm_head.weight")
        else:  # a file without a head of its own means `shared`
            head = [
                Rule("head.weight", ("shared.weight",), vocabulary=True, optional=True),
                Rule("head.weight", ("lm_head.weight",), vocabulary=True, optional=True),
            ]
        return [
            *head,
            *(Rule("embed.weight", (name,), vocabulary=True, optional=True) for name in copies),
            Rule("embed.weight", ("shared.weight",), vocabulary=True),
            *_stack_rules("encoder", model.config.n_layers, model.config.gated),
            *_stack_rules("decoder", model.config.decoder_layers, model.config.gated),
        ]


class MT5(T5):
    """`MT5ForConditionalGeneration` (Xue et al. 2021), whose head is never scaled. Ours are exported as `T5`."""

    model_type = "mt5"

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**_settings(config), "tied": False}

    def accepts(self, model: nn.Module) -> bool:
        return False


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What our model node takes from either's config.json."""
    activation = config.get("feed_forward_proj", "relu")
    if activation not in _GATED:
        raise UserError(f"feed_forward_proj={activation}; expected one of {[*_GATED]}, all that model=t5 has.")
    start = config.get("decoder_start_token_id")
    start = config.get("pad_token_id") if start is None else start
    if start is None:
        raise UserError(
            "decoder_start_token_id and pad_token_id are missing; expected the id that the decoder's input begins with."
        )
    return {
        "_target_": "lmexp.model.t5.T5Config",
        "n_layers": config["num_layers"],
        "n_decoder_layers": config.get("num_decoder_layers"),
        "n_heads": config["num_heads"],
        "d_model": config["d_model"],
        "d_kv": config["d_kv"],
        "d_ff": config["d_ff"],
        "gated": _GATED[activation],
        "max_length": config.get("n_positions", 512),
        "n_buckets": config["relative_attention_num_buckets"],
        "max_distance": config.get("relative_attention_max_distance", 128),
        "dropout": config["dropout_rate"],
        "norm_eps": config["layer_norm_epsilon"],
        "decoder_start_id": start,
    }


def _stack_rules(side: str, n_layers: int, gated: bool) -> list[Rule]:
    """The encoder's or the decoder's position biases, blocks and norm."""
    ours, theirs = f"{side}.blocks", f"{side}.block"
    position_bias = f"{theirs}.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules = [
        Rule(f"{side}.bias.table.weight", (position_bias,)),
        Rule(f"{side}.norm.weight", (f"{side}.final_layer_norm.weight",)),
    ]
    mlp = 2 if side == "decoder" else 1  # the number of the feed-forward among a block's sublayers
    names = {
        "norm1": ("layer.0.layer_norm",),
        "attention.qkv": tuple(f"layer.0.SelfAttention.{part}" for part in "qkv"),
        "attention.output": ("layer.0.SelfAttention.o",),
        "norm2": (f"layer.{mlp}.layer_norm",),
        "mlp.expand": tuple(f"layer.{mlp}.DenseReluDense.{part}" for part in (("wi_0", "wi_1") if gated else ("wi",))),
        "mlp.contract": (f"layer.{mlp}.DenseReluDense.wo",),
    }
    if side == "decoder":
        names |= {
            "norm_cross": ("layer.1.layer_norm",),
            "cross.q": ("layer.1.EncDecAttention.q",),
            "cross.kv": ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
            "cross.output": ("layer.1.EncDecAttention.o",),
        }
    for layer in range(n_layers):
        for own, parts in names.items():
            rules.append(
                Rule(f"{ours}.{layer}.{own}.weight", tuple(f"{theirs}.{layer}.{part}.weight" for part in parts))
            )
    return rules
