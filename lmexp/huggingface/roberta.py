"""RoBERTa and XLM-R: BERT with one segment, whose positions begin after the padding's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, Rule
from lmexp.huggingface.bert import (
    classifier_config,
    classifier_rules,
    head_rules,
    shared_config,
    shared_rules,
    shared_settings,
)
from lmexp.model.bert import Bert
from lmexp.model.classifier import ClassifierHead


class RoBERTa(Architecture):
    """`RobertaForMaskedLM`. Its places are counted over the tokens that are not padding and begin at row 2."""

    model_type = "roberta"
    class_name = "RobertaForMaskedLM"

    padding_id = 1  # it gets no place; the others are counted from the row after it

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["pad_token_id"] != self.padding_id:
            raise UserError(
                f"pad_token_id={config['pad_token_id']}; expected {self.padding_id}, as in all published models: it "
                "says which row the positions begin at."
            )
        return {**shared_settings(config), "max_length": config["max_position_embeddings"] - self.padding_id - 1}

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, Bert) and model.config.n_segments == 1

    def config(self, model: Bert, vocab_size: int) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "architectures": [self.class_name],
            **shared_config(model, vocab_size, "RoBERTa"),
            **classifier_config(model, "RobertaForSequenceClassification"),
            "max_position_embeddings": model.max_length + self.padding_id + 1,
            "pad_token_id": self.padding_id,
        }

    def rules(self, model: Bert) -> list[Rule]:
        rules = shared_rules(model, "roberta")
        places = "roberta.embeddings.position_embeddings.weight"
        rules.append(Rule("position.weight", (places,), offset=self.padding_id + 1))
        if isinstance(model.head, ClassifierHead):
            return rules + classifier_rules("classifier.dense", "classifier.out_proj")
        rules += head_rules("lm_head.dense", "lm_head.layer_norm", ("lm_head.decoder.bias", "lm_head.bias"))
        return rules


class XLMRoBERTa(RoBERTa):
    """`XLMRobertaForMaskedLM`, the same network; what is ours is exported as RoBERTa."""

    model_type = "xlm-roberta"
    class_name = "XLMRobertaForMaskedLM"

    def accepts(self, model: nn.Module) -> bool:
        return False
