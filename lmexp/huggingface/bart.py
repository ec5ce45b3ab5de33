"""BART, and what it shares with Marian, which Transformers derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.model.transformer import Transformer

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "swish", "silu": "swish"}
"""Their `activation_function` -> ours."""

_SAME_ON_BOTH_SIDES = ("attention_heads", "ffn_dim")


class Bart(Architecture):
    """`BartForConditionalGeneration`. Untied (`tie_word_embeddings` false) it has three matrices as ours since
    Transformers 5; before, its two embeddings were one all the same."""

    model_type = "bart"

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**shared_settings(config), "positions": "learned", "embedding_norm": True}

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, Transformer) and model.config.positions == "learned"

    def config(self, model: Transformer, vocab_size: int) -> dict[str, Any]:
        expect(model, "BART", positions="learned", embedding_norm=True, prenorm=False)
        return {
            "model_type": self.model_type,
            "architectures": ["BartForConditionalGeneration"],
            **shared_config(model, vocab_size),
        }

    def rules(self, model: Transformer) -> list[Rule]:
        rules = shared_rules(model)
        for side in ("encoder", "decoder"):
            positions = f"model.{side}.embed_positions.weight"  # their first 2 rows are never looked up
            rules.append(Rule(f"{side}.entry.position.weight", (positions,), offset=2))
            for kind in ("weight", "bias"):
                rules.append(Rule(f"{side}.entry.norm.{kind}", (f"model.{side}.layernorm_embedding.{kind}",)))
        return rules


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What our model node takes from BART's and Marian's config.json alike. Raises `UserError` for what we lack."""
    for name in _SAME_ON_BOTH_SIDES:
        encoder, decoder = config[f"encoder_{name}"], config[f"decoder_{name}"]
        if encoder != decoder:
            raise UserError(
                f"encoder_{name}={encoder} and decoder_{name}={decoder}; expected equal ones, all that "
                "model=transformer has."
            )
    for side in ("encoder", "decoder"):
        if config.get(f"{side}_layerdrop"):
            raise UserError(
                f"{side}_layerdrop={config[f'{side}_layerdrop']}; expected 0: model=transformer drops no layers. It "
                "matters in training only; set it to 0 in config.json."
            )
    if config["activation_function"] not in _ACTIVATIONS:
        raise UserError(f"activation_function={config['activation_function']}; expected one of {[*_ACTIVATIONS]}.")
    if config.get("decoder_start_token_id") is None:
        raise UserError("decoder_start_token_id is missing; expected the id that the decoder's input begins with.")
    return {
        "_target_": "lmexp.model.transformer.TransformerConfig",
        "n_layers": config["encoder_layers"],
        "n_decoder_layers": config["decoder_layers"],
        "n_heads": config["encoder_attention_heads"],
        "d_model": config["d_model"],
        "d_ff": config["encoder_ffn_dim"],
        "max_length": config["max_position_embeddings"],
        "scale_embedding": bool(config["scale_embedding"]),
        "activation": _ACTIVATIONS[config["activation_function"]],
        "tied": config.get("tie_word_embeddings", True),
        "head_bias": True,  # `final_logits_bias`: config.json does not say whether it is zero
        "dropout": config["dropout"],
        "attention_dropout": config["attention_dropout"],
        "activation_dropout": config["activation_dropout"],
        "init_std": config["init_std"],
        "decoder_start_id": config["decoder_start_token_id"],
    }


def shared_config(model: Transformer, vocab_size: int) -> dict[str, Any]:
    """What BART's and Marian's config.json take from our model alike."""
    c = model.config
    config: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": c.max_length,
        "encoder_layers": c.n_layers,
        "decoder_layers": c.decoder_layers,
        "activation_function": c.activation,
        "d_model": c.d_model,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "activation_dropout": c.activation_dropout,
        "scale_embedding": c.scale_embedding,
        "tie_word_embeddings": c.tied,
        "decoder_start_token_id": c.decoder_start_id,
        "forced_eos_token_id": None,  # their default is an id of their own vocabulary
        "is_encoder_decoder": True,
    }
    if c.init_std is not None:
        config["init_std"] = c.init_std
    for side in ("encoder", "decoder"):
        config |= {f"{side}_attention_heads": c.n_heads, f"{side}_ffn_dim": c.ff_width}
    return config


def shared_rules(model: Transformer) -> list[Rule]:
    """Embeddings, blocks and head; the names of BART and Marian are the same."""
    c = model.config
    shared, encoder, decoder = (
        f"model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    # their `shared` is the embedding where it is tied and an idle copy where not; of two rules the later one counts
    if c.tied:
        copies = (encoder, decoder, "lm_head.weight")
        rules = [Rule("embed.weight", (name,), vocabulary=True, optional=True) for name in copies]
        rules.append(Rule("embed.weight", (shared,), vocabulary=True))
    else:
        rules = [
            Rule("embed.weight", (shared,), vocabulary=True, optional=True),
            Rule("embed.weight", (encoder,), vocabulary=True),
            Rule("decoder_embed.weight", (decoder,), vocabulary=True),
            Rule("head.weight", ("lm_head.weight",), vocabulary=True),
        ]
    if c.head_bias:  # theirs is (1, V)
        rules.append(Rule("head.bias", ("final_logits_bias",), transpose=True, vocabulary=True, optional=True))

    of_encoder: dict[str, tuple[str, ...]] = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": ("self_attn.out_proj",),
        "norm1": ("self_attn_layer_norm",),
        "mlp.expand": ("fc1",),
        "mlp.contract": ("fc2",),
        "norm2": ("final_layer_norm",),
    }
    of_decoder = of_encoder | {
        "cross.q": ("encoder_attn.q_proj",),
        "cross.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "cross.output": ("encoder_attn.out_proj",),
        "norm2": ("encoder_attn_layer_norm",),
        "norm3": ("final_layer_norm",),
    }
    for side, n_layers, of_side in (("encoder", c.n_layers, of_encoder), ("decoder", c.decoder_layers, of_decoder)):
        for layer in range(n_layers):
            for ours, theirs in of_side.items():
                for kind in ("weight", "bias"):
                    parts = tuple(f"model.{side}.layers.{layer}.{name}.{kind}" for name in theirs)
                    rules.append(Rule(f"{side}.blocks.{layer}.{ours}.{kind}", parts))
    return rules


def expect(model: Transformer, architecture: str, **expected: Any) -> None:
    """Raise `UserError` for the first option of ours that is not the one `architecture` has."""
    for key, value in expected.items():
        own = getattr(model.config, key)
        if own != value:
            yes, no = (str(v).lower() if isinstance(v, bool) else v for v in (value, own))
            raise UserError(
                f"model.{key}={no}: {architecture} of Transformers has {yes} only; to export, train with "
                f"model.{key}={yes}."
            )
