"""Marian, the translation models of OPUS-MT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.huggingface.bart import expect, shared_config, shared_rules, shared_settings
from lmexp.model.transformer import Transformer


class Marian(Architecture):
    """`MarianMTModel`. Its files may hold the tables of its sinusoids (`embed_positions`); ours are computed."""

    model_type = "marian"
    computed = (".embed_positions.weight",)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if not config.get("share_encoder_decoder_embeddings", True):
            raise UserError(
                "share_encoder_decoder_embeddings=false; expected true: model=transformer has one vocabulary for both "
                "sides."
            )
        if config.get("decoder_vocab_size") not in (None, config["vocab_size"]):
            raise UserError(
                f"decoder_vocab_size={config['decoder_vocab_size']}; expected vocab_size={config['vocab_size']}: "
                "model=transformer has one vocabulary for both sides."
            )
        return {**shared_settings(config), "positions": "sinusoidal_halves"}

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, Transformer) and model.config.positions != "learned"

    def config(self, model: Transformer, vocab_size: int) -> dict[str, Any]:
        expect(model, "Marian", positions="sinusoidal_halves", embedding_norm=False, prenorm=False)
        return {
            "model_type": self.model_type,
            "architectures": ["MarianMTModel"],
            **shared_config(model, vocab_size),
            "decoder_vocab_size": vocab_size,
            "share_encoder_decoder_embeddings": True,
            # Marian's decoder begins with the padding; their default is an id of their own vocabulary
            "pad_token_id": model.decoder_start_id,
        }

    def rules(self, model: Transformer) -> list[Rule]:
        return shared_rules(model)
