"""What Hugging Face keeps a model in: a folder, a name on the hub, or a GGUF file; its configuration and weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmexp.contracts import UserError

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights are looked for, in this order."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model of Hugging Face's that was found; the weights are not read yet."""

    name: str
    """As it was asked for."""

    folder: Path
    """Where its files lie."""

    config: dict[str, Any]
    """Its config.json, complete: with the defaults of its kind."""

    tokenizer: Path | None
    """A folder with its tokenizer.json, None if there is none."""

    gguf: str | None = None
    """The name of the GGUF file in the folder, if that is what it is."""

    def state(self) -> dict[str, Tensor]:
        """Its weights by their names, those of a GGUF file as float32. Raises `UserError` for damaged ones."""
        if self.gguf is not None:
            auto = transformers(f"{self.name} is a GGUF file").AutoModelForCausalLM
            try:
                model = auto.from_pretrained(self.folder, gguf_file=self.gguf)
            except Exception as error:  # of the library and of the file alike
                raise UserError(f"{self.name} cannot be loaded by Transformers: {_line(error)}") from error
            return {name: value.float() for name, value in model.state_dict().items()}
        return _read_weights(self.folder)


def find(name: str, cache_dir: Path | str) -> Source:
    """The model that a folder, a GGUF file or a name on the hub means; a download lies in the hub's own cache.

    `cache_dir` gets the tokenizer of a GGUF file as a folder. Raises `UserError` if there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file; expected a Hugging Face folder, a GGUF file (.gguf) or a hub name.")
        return _find_gguf(name, path, Path(cache_dir))
    if not path.is_dir():
        path = _download(name)
    if not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; name the file in it: {path / inside[0]}" if inside else ""
        raise UserError(f"{name} holds no config.json; expected a folder that save_pretrained wrote{hint}.")
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    return Source(name, path, complete(_read_json(path / "config.json")), tokenizer)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults that it leaves out, which Transformers knows."""
    kind = config.get("model_type")
    if kind is None:
        raise UserError("config.json has no model_type; expected the configuration of a model of Transformers.")
    auto = transformers("config.json leaves defaults out, which Transformers knows").AutoConfig
    try:
        full: dict[str, Any] = auto.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"}).to_dict()
    except Exception as error:  # of unknown kinds, and of values that their checks refuse
        raise UserError(f"config.json (model_type={kind}) is refused by Transformers: {_line(error)}") from error
    return full


def transformers(reason: str) -> ModuleType:
    """The library; `UserError` with the reason that it is needed for if it is not installed."""
    return library("transformers", reason)


def library(name: str, reason: str) -> ModuleType:
    """An optional library, imported when it is needed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{reason}: this needs the library {name}; install it with pip install {name}.") from error


def _find_gguf(name: str, path: Path, cache_dir: Path) -> Source:
    library("gguf", f"{name} is a GGUF file")
    auto = transformers(f"{name} is a GGUF file")
    with path.open("rb") as file:
        start = file.read(2**20)
    key = hashlib.sha256(start + str(path.stat().st_size).encode()).hexdigest()[:16]
    folder = cache_dir / "tokenizers" / f"gguf-{key}"
    try:
        config = auto.AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
        if not (folder / "tokenizer.json").is_file():
            tokenizer = auto.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = tempfile.mkdtemp(prefix=".gguf-", dir=folder.parent)
            try:
                tokenizer.save_pretrained(beside)
                with suppress(OSError):  # another process was faster
                    os.rename(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except Exception as error:  # of the library and of the file alike
        raise UserError(f"{name} cannot be read by Transformers: {_line(error)}") from error
    return Source(name, path.parent, config, folder, gguf=path.name)


def _download(name: str) -> Path:
    """The hub's files of a model, at its cache's place."""
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name} does not exist; expected a Hugging Face folder, a GGUF file or a name on the hub.")
    hub = library("huggingface_hub", f"{name} is a name on the hub")
    wanted = ["*.json", "*.txt", "*.safetensors"]
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not any((folder / weights).is_file() for weights in _WEIGHTS):
            hub.snapshot_download(name, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # a dozen types, from the hub's client and its network library
        raise UserError(
            f"{name} is no folder here, and cannot be had from the hub: {type(error).__name__}: {_line(error)} Check "
            "the name; without a network, give the path of a folder that holds the model."
        ) from error
    return folder


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or the parts that an index names."""
    for name in _WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return _read_tensors(path)
        index: dict[str, str] = _read_json(path).get("weight_map", {})
        state: dict[str, Tensor] = {}
        for part in sorted(set(index.values())):
            if Path(part).name != part or not (folder / part).is_file():
                raise UserError(f"{path} names {part}, which is not beside it; download the whole model.")
            state |= _read_tensors(folder / part)
        _refuse_missing(path, index, state)
        return state
    raise UserError(f"{folder} holds no weights; expected one of {', '.join(_WEIGHTS)}.")


def _refuse_missing(path: Path, wanted: Iterable[str], state: dict[str, Tensor]) -> None:
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise UserError(f"{path} names {', '.join(missing[:3])}, which its parts do not hold; download the model anew.")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = library("safetensors.torch", f"{path.name} holds the weights").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # each format has its own, and torch has several
        raise UserError(f"{path} cannot be read ({_line(error)}); it may be cut off: get it anew.") from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; expected one.")
    return content


def _line(error: Exception) -> str:
    """An error of a library's in one line."""
    text = " ".join(str(error).split())[:300]
    return text if text.endswith((".", "!")) else f"{text}."
