"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.model.gpt import GPT

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")

_ALWAYS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
}
"""Their options that ours has in one way only."""


class GPT2(Architecture):
    """`GPT2LMHeadModel`: its Conv1D weights are (in, out)."""

    model_type = "gpt2"
    computed = (".attn.bias", ".attn.masked_bias")

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        inner = config.get("n_inner")
        if config["activation_function"] not in _ACTIVATIONS:
            raise UserError(f"activation_function={config['activation_function']}; expected one of {_ACTIVATIONS}.")
        if inner not in (None, 4 * config["n_embd"]):
            raise UserError(f"n_inner={inner}; expected 4 * n_embd={4 * config['n_embd']}, all that model=gpt has.")
        for key, expected in _ALWAYS.items():
            if config.get(key, expected) != expected:
                raise UserError(f"{key}={config[key]}; expected {expected}, all that model=gpt has.")
        return {
            "_target_": "lmexp.model.gpt.GPTConfig",
            "n_layers": config["n_layer"],
            "n_heads": config["n_head"],
            "d_model": config["n_embd"],
            "max_length": config["n_positions"],
            "bias": True,
        }

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, GPT)

    def config(self, model: GPT, vocab_size: int) -> dict[str, Any]:
        c = model.config
        if not c.bias:
            raise UserError("model.bias=false: GPT-2 of Transformers always has biases; train with model.bias=true.")
        return {
            "model_type": self.model_type,
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": vocab_size,
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_embd": c.d_model,
            "n_positions": c.max_length,
            "activation_function": "gelu_new",
            "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "tie_word_embeddings": True,
        }

    def rules(self, model: GPT) -> list[Rule]:
        rules = [
            Rule("embed.weight", ("lm_head.weight",), vocabulary=True, optional=True),  # a copy; the next one counts
            Rule("embed.weight", ("transformer.wte.weight",), vocabulary=True),
            Rule("position.weight", ("transformer.wpe.weight",)),
            Rule("norm.weight", ("transformer.ln_f.weight",)),
            Rule("norm.bias", ("transformer.ln_f.bias",)),
        ]
        names = {
            "norm1": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.output": "attn.c_proj",
            "norm2": "ln_2",
            "mlp.expand": "mlp.c_fc",
            "mlp.contract": "mlp.c_proj",
        }
        for layer in range(model.n_layers):
            for ours, theirs in names.items():
                for kind in ("weight", "bias"):
                    a, b = f"blocks.{layer}.{ours}.{kind}", f"transformer.h.{layer}.{theirs}.{kind}"
                    rules.append(Rule(a, (b,), transpose=kind == "weight" and not ours.startswith("norm")))
        return rules
