"""Llama, and the models that differ from it in a few options: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.model import llama


class Llama(Architecture):
    """`LlamaForCausalLM`: Llama 1 to 3.2, TinyLlama, SmolLM2."""

    model_type = "llama"
    computed = (".rotary_emb.inv_freq",)
    class_name = "LlamaForCausalLM"
    """Their class with a head."""

    qkv_bias = False
    qk_norm = False

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        self._refuse(config)
        n_heads, d_model = config["num_attention_heads"], config["hidden_size"]
        theta, scaling = _rope(config)
        d_head = config.get("head_dim")
        return {
            "_target_": "lmexp.model.llama.LlamaConfig",
            "n_layers": config["num_hidden_layers"],
            "n_heads": n_heads,
            "n_kv_heads": config.get("num_key_value_heads") or n_heads,
            "d_model": d_model,
            "d_ff": config["intermediate_size"],
            "d_head": None if d_head in (None, d_model / n_heads) else d_head,
            "max_length": config["max_position_embeddings"],
            "tied": bool(config["tie_word_embeddings"]),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "norm_eps": config["rms_norm_eps"],
            "init_std": config["initializer_range"],
        }

    def _refuse(self, config: Mapping[str, Any]) -> None:
        """Raise `UserError` for an option that ours lacks."""
        always = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
        for key, expected in always.items():
            if config.get(key, expected) != expected:
                raise UserError(f"{key}={config[key]}; expected {expected}, all that model=llama has.")
        window, length = config.get("sliding_window"), config["max_position_embeddings"]
        if config.get("use_sliding_window", True) and window is not None and window < length:
            raise UserError(
                f"sliding_window={window}, less than max_position_embeddings={length}; model=llama attends to all "
                f"positions. Within {window} that is the same: set both to {window} in config.json."
            )
        if config.get("attention_dropout"):
            raise UserError(
                f"attention_dropout={config['attention_dropout']}; expected 0: model=llama has no dropout. It matters "
                "in training only; set it to 0 in config.json."
            )

    def accepts(self, model: nn.Module) -> bool:
        if not isinstance(model, llama.Llama):
            return False
        return model.config.qkv_bias == self.qkv_bias and model.config.qk_norm == self.qk_norm

    def config(self, model: llama.Llama, vocab_size: int) -> dict[str, Any]:
        c = model.config
        # the spelling of Transformers 4, which 5 reads too
        scaling = None if c.rope_scaling is None else {"rope_type": "llama3", **c.rope_scaling}
        return {
            "model_type": self.model_type,
            "architectures": [self.class_name],
            "vocab_size": vocab_size,
            "hidden_size": c.d_model,
            "intermediate_size": c.d_ff,
            "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": c.max_length,
            "rms_norm_eps": c.norm_eps,
            "initializer_range": c.init_std,
            "rope_theta": c.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": c.tied,
            "attention_bias": False,
        }

    def rules(self, model: llama.Llama) -> list[Rule]:
        c = model.config
        # a copy, of which the next one counts; or a head of its own, which files of the base model lack
        head = Rule("embed.weight" if c.tied else "head.weight", ("lm_head.weight",), vocabulary=True, optional=True)
        rules = [
            head,
            Rule("embed.weight", ("model.embed_tokens.weight",), vocabulary=True),
            Rule("norm.weight", ("model.norm.weight",)),
        ]
        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        names: dict[str, tuple[str, ...]] = {
            "norm1.weight": ("input_layernorm",),
            "attention.qkv.weight": qkv,
            "attention.output.weight": ("self_attn.o_proj",),
            "norm2.weight": ("post_attention_layernorm",),
            "mlp.expand.weight": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.contract.weight": ("mlp.down_proj",),
        }
        if c.qkv_bias:
            names["attention.qkv.bias"] = qkv
        if c.qk_norm:
            names |= {f"attention.{part}_norm.weight": (f"self_attn.{part}_norm",) for part in "qk"}
        groups = tuple(c.head_width * n for n in (c.n_heads, c.kv_heads, c.kv_heads))
        for layer in range(c.n_layers):
            for ours, modules in names.items():
                kind = ours.rpartition(".")[2]
                theirs = tuple(f"model.layers.{layer}.{module}.{kind}" for module in modules)
                rules.append(Rule(f"blocks.{layer}.{ours}", theirs, rows=groups if modules is qkv else ()))
        return rules


class Mistral(Llama):
    """`MistralForCausalLM` without its sliding window. Ours are exported as `Llama`."""

    model_type = "mistral"

    def accepts(self, model: nn.Module) -> bool:
        return False


class Qwen2(Llama):
    """`Qwen2ForCausalLM`: Qwen 1.5, 2 and 2.5."""

    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    qkv_bias = True


class Qwen3(Llama):
    """`Qwen3ForCausalLM`."""

    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    qk_norm = True


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, float] | None]:
    """Theta and our `rope_scaling`; Transformers 5 has both in `rope_parameters`, 4 in keys of these names."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type={kind}; expected default or llama3, all that model=llama has.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}; expected 1: model=llama rotates whole heads."
        )
    return theta, {key: rope[key] for key in llama.SCALING_KEYS} if kind == "llama3" else None
