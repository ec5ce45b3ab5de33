"""The architectures of Transformers that there is a model of ours for, and models read as ours."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture
from lmexp.huggingface.files import find

ARCHITECTURES = {
    "gpt2": "gpt2:GPT2",
    "llama": "llama:Llama",
    "mistral": "llama:Mistral",
    "qwen2": "llama:Qwen2",
    "qwen3": "llama:Qwen3",
    "bert": "bert:BERT",
    "roberta": "roberta:RoBERTa",
    "xlm-roberta": "roberta:XLMRoBERTa",
    "t5": "t5:T5",
    "mt5": "t5:MT5",
    "bart": "bart:Bart",
    "marian": "marian:Marian",
}
"""`model_type` of a config.json -> module and class in this folder, which is imported when it is asked for."""


def architecture(model_type: str) -> Architecture:
    """The architecture of a `model_type`; `UserError` if ours has no such model."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type={model_type} is none that lmexp has a model for ({', '.join(ARCHITECTURES)}). It can be "
            "trained as it is: model=auto model.name=NAME."
        )
    module, _, name = ARCHITECTURES[model_type].partition(":")
    found = getattr(import_module(f"lmexp.huggingface.{module}"), name)()
    assert isinstance(found, Architecture)
    return found


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture to export a model of ours as; `UserError` if Transformers has none like it."""
    for model_type in ARCHITECTURES:
        found = architecture(model_type)
        if found.accepts(model):
            return found
    raise UserError(
        f"Transformers has no architecture like this {type(model).__name__}, so it cannot be exported; what can: "
        f"{', '.join(ARCHITECTURES)}."
    )


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model node, `_target_` and its keys, for a complete config.json."""
    return architecture(config["model_type"]).settings(config)


def read(name: str, cache_dir: Path | str = ".cache") -> tuple[dict[str, Any], dict[str, Tensor], Path | None]:
    """A folder's, a GGUF file's or a hub name's complete config.json, weights by their names, and the folder of the
    tokenizer (None: it has none). See `find`."""
    source = find(name, cache_dir)
    return source.config, source.state(), source.tokenizer
