"""Tokenizers that others trained: a tokenizer.json, a model's folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmexp.contracts import UserError
from lmexp.tokenizer.subword import SubwordTokenizer
from lmexp.tokenizer.tokenizer import Tokenizer

_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_PAD = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_UNK = ("<unk>", "[UNK]", "<|unk|>")


@dataclass
class Pretrained:
    """Loads a trained tokenizer; nothing is learned from the corpus."""

    path: str | None
    """A tokenizer.json (of the tokenizers library or of ours), a folder that holds one, or a name on the hub."""

    eos: str | None = None
    """The token that ends a document; None: the folder's tokenizer_config.json, then the customary spellings."""

    needs_text = False

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "tokenizer.path is not given; expected a tokenizer.json, a folder that holds one, or a name on the "
                "Hugging Face hub: tokenizer.path=gpt2."
            )

    @property
    def key(self) -> dict[str, Any]:
        file = self._file()
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file else self.path
        return {"kind": "pretrained", "content": content, "eos": self.eos}

    def _file(self) -> Path | None:
        """The local tokenizer.json, or None for a name on the hub."""
        path = Path(str(self.path)).expanduser()
        if path.is_dir():
            if not (path / "tokenizer.json").is_file():
                raise UserError(
                    f"tokenizer.path={self.path} holds no tokenizer.json; give a folder or file that is one."
                )
            return path / "tokenizer.json"
        return path if path.is_file() else None

    def train(self, texts: Iterator[str], progress: bool = False) -> Tokenizer:
        """Load it; `UserError` if there is none, or if no token of it ends documents."""
        import tokenizers

        file = self._file()
        config: dict[str, Any] = {}
        try:
            if file is None:
                backend = tokenizers.Tokenizer.from_pretrained(str(self.path))
            else:
                text = file.read_text(encoding="utf-8")
                if "kind" in json.loads(text):
                    return Tokenizer.from_json(text)
                backend = tokenizers.Tokenizer.from_str(text)
                beside = file.with_name("tokenizer_config.json")
                config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"tokenizer.path={self.path}: no tokenizer could be loaded ({error}). Expected an existing "
                "tokenizer.json, a folder that holds one, or, with a network, a name on the hub."
            ) from error
        vocabulary = backend.get_vocab(with_added_tokens=True)
        eos = self.eos or _spelling(config.get("eos_token"))
        if eos is not None and eos not in vocabulary:
            raise UserError(f"tokenizer.eos={eos} is not in the vocabulary of {self.path}; give one that is.")
        eos = eos or _first(_EOS, vocabulary)
        if eos is None:
            raise UserError(
                f"The tokenizer {self.path} has no known token that ends documents (looked for {' '.join(_EOS)}); "
                "name one of its tokens with tokenizer.eos=TOKEN."
            )
        pad = _spelling(config.get("pad_token"))
        unk = _spelling(config.get("unk_token")) or getattr(backend.model, "unk_token", None)
        pad = pad if pad in vocabulary else _first(_PAD, vocabulary)
        unk = unk if unk in vocabulary else _first(_UNK, vocabulary)
        return SubwordTokenizer(backend, eos=eos, pad=pad, unk=None if unk == eos else unk)


def _spelling(token: Any) -> str | None:
    """tokenizer_config.json holds tokens as strings or as objects with their content."""
    return token.get("content") if isinstance(token, dict) else token


def _first(spellings: tuple[str, ...], vocabulary: dict[str, int]) -> str | None:
    return next((spelling for spelling in spellings if spelling in vocabulary), None)
