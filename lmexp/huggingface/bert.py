"""BERT, and what it shares with RoBERTa, whose encoder is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.model.bert import Bert
from lmexp.model.classifier import ClassifierHead


class BERT(Architecture):
    """`BertForMaskedLM` and, with its pooler, `BertForSequenceClassification`. Next-sentence heads are not used."""

    model_type = "bert"

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**shared_settings(config), "max_length": config["max_position_embeddings"]}

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, Bert) and model.config.n_segments != 1  # that is RoBERTa's

    def config(self, model: Bert, vocab_size: int) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "architectures": ["BertForMaskedLM"],
            **shared_config(model, vocab_size, "BERT"),
            **classifier_config(model, "BertForSequenceClassification"),
            "max_position_embeddings": model.max_length,
        }

    def rules(self, model: Bert) -> list[Rule]:
        rules = shared_rules(model, "bert")
        rules.append(Rule("position.weight", ("bert.embeddings.position_embeddings.weight",)))
        if isinstance(model.head, ClassifierHead):
            return rules + classifier_rules("bert.pooler.dense", "classifier")
        rules += head_rules(
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            biases=("cls.predictions.decoder.bias", "cls.predictions.bias"),
        )
        return rules


def classifier_config(model: Bert, class_name: str) -> dict[str, Any]:
    """What config.json says of a classifier; nothing for other models. Raises `UserError` for one that they lack."""
    head = model.head
    if not isinstance(head, ClassifierHead):
        return {}
    for key, value, expected in (("pooling", head.pooling, "first"), ("hidden_layer", head.hidden is not None, True)):
        if value != expected:
            raise UserError(
                f"task.{key}={str(value).lower()}: {class_name} of Transformers has {str(expected).lower()} only; to "
                f"export, train with task.{key}={str(expected).lower()}."
            )
    return {
        "architectures": [class_name],
        "id2label": {str(number): name for number, name in enumerate(head.labels)},
        "label2id": {name: number for number, name in enumerate(head.labels)},
        "problem_type": "multi_label_classification" if head.multilabel else "single_label_classification",
        "classifier_dropout": head.dropout,
    }


def classifier_rules(hidden: str, output: str) -> list[Rule]:
    """The head of a classifier, of which files of other models have the first layer or none."""
    names = (("hidden", hidden), ("output", output))
    kinds = ("weight", "bias")
    return [
        Rule(f"head.{ours}.{kind}", (f"{theirs}.{kind}",), optional=True) for ours, theirs in names for kind in kinds
    ]


_EXPECTED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
}
"""What our model has no other of; a config.json need not say it."""


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What our model node takes from BERT's and RoBERTa's config.json alike. Raises `UserError` for what we lack."""
    for key, value in _EXPECTED.items():
        if config.get(key, value) != value:
            raise UserError(f"{key}={config[key]}; expected {value}, all that model=bert has.")
    return {
        "_target_": "lmexp.model.bert.BertConfig",
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "d_model": config["hidden_size"],
        "d_ff": config["intermediate_size"],
        "n_segments": config["type_vocab_size"],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "norm_eps": config["layer_norm_eps"],
        "init_std": config["initializer_range"],
    }


def shared_config(model: Bert, vocab_size: int, architecture: str) -> dict[str, Any]:
    """What BERT's and RoBERTa's config.json take from our model alike. Raises `UserError` for what they lack."""
    c = model.config
    expected = {"prenorm": False, "rope": False, "gated": False, "bias": True, "head_transform": True, "n_languages": 0}
    for key, value in expected.items():
        own = getattr(c, key)
        if own != value:
            yes, no = (str(v).lower() for v in (value, own))
            raise UserError(
                f"model.{key}={no}: {architecture} of Transformers has {yes} only; to export, train with "
                f"model.{key}={yes}."
            )
    if c.n_segments == 0:
        raise UserError(
            f"model.n_segments=0: {architecture} of Transformers always has a segment embedding; to export, train with "
            "model.n_segments=2 (all tokens are segment 0 unless said otherwise)."
        )
    return {
        "vocab_size": vocab_size,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "hidden_size": c.d_model,
        "intermediate_size": c.ff_width,
        "type_vocab_size": c.n_segments,
        "hidden_act": "gelu",
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
        "layer_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "tie_word_embeddings": True,
    }


def shared_rules(model: Bert, base: str) -> list[Rule]:
    """Embeddings but for positions, and blocks; the names are the same under `base`."""
    tables = f"{base}.embeddings"
    # their output matrix, a copy of the embedding, may stand in a file too; of two rules the later one counts
    copy = {"bert": "cls.predictions.decoder.weight", "roberta": "lm_head.decoder.weight"}[base]
    rules = [
        Rule("embed.weight", (copy,), vocabulary=True, optional=True),
        Rule("embed.weight", (f"{tables}.word_embeddings.weight",), vocabulary=True),
    ]
    if model.segment is not None:
        rules.append(Rule("segment.weight", (f"{tables}.token_type_embeddings.weight",)))
    names: dict[str, tuple[str, ...]] = {
        "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output": ("attention.output.dense",),
        "norm1": ("attention.output.LayerNorm",),
        "mlp.expand": ("intermediate.dense",),
        "mlp.contract": ("output.dense",),
        "norm2": ("output.LayerNorm",),
    }
    for kind in ("weight", "bias"):
        rules.append(Rule(f"embed_norm.{kind}", (f"{tables}.LayerNorm.{kind}",)))
        for layer in range(model.n_layers):
            for ours, theirs in names.items():
                parts = tuple(f"{base}.encoder.layer.{layer}.{name}.{kind}" for name in theirs)
                rules.append(Rule(f"blocks.{layer}.{ours}.{kind}", parts))
    return rules


def head_rules(dense: str, norm: str, biases: tuple[str, ...]) -> list[Rule]:
    """The head, which files of base models leave out. `biases`: names of the one bias, of which the last counts."""
    rules = [Rule("head.bias", (name,), vocabulary=True, optional=True) for name in biases]
    for kind in ("weight", "bias"):
        rules.append(Rule(f"head.transform.dense.{kind}", (f"{dense}.{kind}",), optional=True))
        rules.append(Rule(f"head.transform.norm.{kind}", (f"{norm}.{kind}",), optional=True))
    return rules
