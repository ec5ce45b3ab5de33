"""A model of ours as the folder that Transformers' `from_pretrained` loads, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, to_theirs
from lmexp.huggingface.convert import architecture_of
from lmexp.huggingface.files import library
from lmexp.model.auto import AutoModel
from lmexp.model.classifier import ClassifierHead
from lmexp.run.directory import write_json
from lmexp.tokenizer.byte import ByteTokenizer
from lmexp.tokenizer.char import CharTokenizer
from lmexp.tokenizer.subword import SubwordTokenizer
from lmexp.tokenizer.tokenizer import EOS, UNK, Tokenizer

if TYPE_CHECKING:
    import tokenizers

_ROLES = {"mask": "mask_token", "cls": "cls_token", "sep": "sep_token", "bos": "bos_token"}
"""Our roles -> what tokenizer_config.json calls their tokens."""


def write(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, segments: bool = False
) -> str:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files; returns their class.

    The tokenizer of a classifier puts the marks around texts that it was trained with, and with `segments` tells the
    second of two apart. Weights are written as `dtype`; rows that pad the vocabulary are left out. Raises `UserError`
    for a model that Transformers has nothing like.
    """
    if isinstance(model, AutoModel):
        model.network.to(dtype).save_pretrained(folder)
        class_name = type(model.network).__name__
    else:
        class_name = _write_ours(folder, model, tokenizer, dtype)
    marks = _marks(tokenizer, segments) if isinstance(model.head, ClassifierHead) else None
    _write_tokenizer(folder, tokenizer, int(model.max_length), model.family, marks)  # type: ignore[arg-type]
    return class_name


def _write_ours(folder: Path, model: Any, tokenizer: Tokenizer, dtype: torch.dtype) -> str:
    safetensors = library("safetensors.torch", "format=hf writes model.safetensors")
    architecture = architecture_of(model)
    known = {rule.ours for rule in architecture.rules(model)}
    if isinstance(model.head, ClassifierHead) and "head.output.weight" not in known:
        raise UserError(
            f"Classifiers of {type(model).__name__} cannot be exported yet, those of BERT and RoBERTa alone; use "
            "job=predict, or train with model=bert."
        )
    config = architecture.config(model, tokenizer.vocab_size)
    if architecture.padding_id not in (None, tokenizer.pad_id):
        raise UserError(
            f"{config['architectures'][0]} takes id {architecture.padding_id} for padding, and here that id is text "
            f"(padding is id {tokenizer.pad_id}), so that the exported model would compute something else; train with "
            "model.n_segments=2, which exports as BERT."
        )
    for key, value in _token_ids(model.family, tokenizer).items():
        config.setdefault(key, value)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    state = to_theirs(architecture, model, tokenizer.vocab_size)
    if config.get("tie_word_embeddings"):
        for name in _copies(architecture, model):
            del state[name]
    state = {name: value.to(dtype) for name, value in state.items()}
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library makes it for its owner only
    write_json(folder / "config.json", config)
    if model.family != "encoder":
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        write_json(folder / "generation_config.json", {key: config[key] for key in ids if config.get(key) is not None})
    class_name: str = config["architectures"][0]
    return class_name


def _marks(tokenizer: Tokenizer, segments: bool) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that makes of texts what `objective.classification` makes of them."""
    import tokenizers

    cls, eos = (tokenizer.decode([i]) for i in (tokenizer.roles["cls"], tokenizer.eos_id))
    second = int(segments)
    template = tokenizers.processors.TemplateProcessing(
        single=[f"{cls}:0", "$A:0", f"{eos}:0"],
        pair=[f"{cls}:0", "$A:0", f"{eos}:0", f"$B:{second}", f"{eos}:{second}"],
        special_tokens=[(cls, tokenizer.roles["cls"]), (eos, tokenizer.eos_id)],
    )
    found: dict[str, Any] = json.loads(template.__getstate__())
    return found


def _token_ids(family: Any, tokenizer: Tokenizer) -> dict[str, int | None]:
    """What config.json says of special tokens where the architecture has not said it."""
    own_padding = tokenizer.pad_id != tokenizer.eos_id
    return {
        "bos_token_id": tokenizer.roles.get("bos", tokenizer.eos_id),  # documents of ours begin after an end
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id if own_padding or family != "decoder" else None,
    }


def _copies(architecture: Architecture, model: nn.Module) -> set[str]:
    """Their names for what stands in the file already, which tied models make of that themselves."""
    rules = architecture.rules(model)
    last = {rule.ours: rule for rule in rules}
    copies = {name for rule in rules if rule.optional and rule is not last[rule.ours] for name in rule.theirs}
    return copies - {name for rule in last.values() for name in rule.theirs}


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, max_length: int, family: str, marks: dict[str, Any] | None
) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    content = tokenizers_json(tokenizer)
    write_json(folder / "tokenizer.json", content if marks is None else {**content, "post_processor": marks})
    spelling = backend_of(tokenizer).id_to_token
    special = {"eos_token": spelling(tokenizer.eos_id)}
    if family == "decoder":
        special["bos_token"] = special["eos_token"]
    if tokenizer.pad_id != tokenizer.eos_id:
        special["pad_token"] = spelling(tokenizer.pad_id)
    elif family != "decoder":
        special["pad_token"] = special["eos_token"]
    if tokenizer.unk_id is not None:
        special["unk_token"] = spelling(tokenizer.unk_id)
    special |= {theirs: spelling(tokenizer.roles[role]) for role, theirs in _ROLES.items() if role in tokenizer.roles}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if marks is not None:
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def tokenizers_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json of the `tokenizers` library; that of a subword tokenizer as it was saved, since
    the library may write a float one bit off."""
    if isinstance(tokenizer, SubwordTokenizer):
        saved: dict[str, Any] = json.loads(tokenizer.to_json())["tokenizers"]
        return saved
    content: dict[str, Any] = json.loads(backend_of(tokenizer).to_str())
    return content


def backend_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as the `tokenizers` library runs it: the same ids for the same text.

    Bytes become a byte-level BPE without merges, characters a vocabulary of words of one character each.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if isinstance(tokenizer, SubwordTokenizer):
        return tokenizer.backend
    special = [EOS]
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {EOS: 0} | {letter: 1 + byte for byte, letter in enumerate(_byte_letters())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        vocabulary = {spelling: i for i, spelling in enumerate([EOS, UNK, *tokenizer.characters])}
        backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        special.append(UNK)
    else:
        raise UserError(f"The tokenizer {type(tokenizer).__name__} has no form that Transformers reads.")
    special += tokenizer.special
    backend.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in special])
    assert backend.get_vocab_size(with_added_tokens=True) == tokenizer.vocab_size
    return backend


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`): printable ones
    stand for themselves, the others are numbered from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
