"""The tokenizer as everything else sees it; each other file of this folder is one kind of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lmexp.contracts import UserError

if TYPE_CHECKING:
    from typing import Self  # type: ignore[attr-defined, unused-ignore]

EOS = "<|endoftext|>"
"""The token that ends every document; id 0 in the tokenizers trained here."""

UNK = "<|unk|>"
"""What stands for text that a lossy tokenizer cannot spell."""

ROLES = {
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
    "cls": ("<|cls|>", "[CLS]", "<s>"),
    "sep": ("<|sep|>", "[SEP]", "</s>"),
    "bos": ("<|bos|>", "<s>", "[CLS]", "<bos>", "<|begin_of_text|>"),
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>"),
}
"""What a special token is for -> how it is spelled: here first, then elsewhere. `sentinel_N` is `<extra_id_N>`."""

FILE_NAME = "tokenizer.json"


class TokenizerConfig(Protocol):
    """The settings of a tokenizer (`conf/tokenizer`): made into one by training on text."""

    needs_text: bool
    """False: `train` does not read its texts."""

    @property
    def key(self) -> dict[str, Any]:
        """All settings that the result depends on, for the names of caches."""
        ...

    def train(self, texts: Iterator[str], progress: bool = False) -> Tokenizer:
        """The tokenizer for these documents."""
        ...


class Tokenizer(ABC):
    """Turns text into token ids in [0, vocab_size) and back.

    Text that literally holds a special token is encoded as ordinary text, so that no document can end early.
    """

    vocab_size: int
    """How many ids there are."""

    eos_id: int
    """The id that ends a document."""

    pad_id: int
    """An id to fill with; `eos_id` where the tokenizer has no padding of its own. Padding is never scored."""

    unk_id: int | None
    """The id of text outside the vocabulary; None: every text can be spelled."""

    lossless: bool
    """True: `decode(encode(text)) == text` for every Unicode text."""

    token_bytes: np.ndarray
    """(vocab_size,) float32: UTF-8 bytes of the text that each id stands for, 0 for special tokens. Exact where
    `lossless` and for characters, else an estimate from the piece's spelling."""

    @cached_property
    def fragments(self) -> np.ndarray:
        """(vocab_size,) bool: ids that spell part of a character only, as byte-level vocabularies have."""
        return np.array(["\ufffd" in self.decode([i], skip_special=True) for i in range(self.vocab_size)])

    roles: dict[str, int]
    """Role -> the id of its special token, of those that `with_roles` was asked for."""

    def with_roles(self, roles: Sequence[str]) -> Tokenizer:
        """A tokenizer that has a special token for each role (a key of `ROLES`, or sentinel_N), under `roles`.

        One that the vocabulary spells already is taken; the others get ids after its end, so that the ids of text
        stay what they are. Itself, if it has them all.
        """
        if all(role in self.roles for role in roles):
            return self
        known, added = dict(self.roles), []
        for role in roles:
            if role in known:
                continue
            spellings = ROLES.get(role) or (f"<extra_id_{int(role.removeprefix('sentinel_'))}>",)
            found = [i for i in map(self._special_id, spellings) if i is not None]
            if not found:
                added.append(spellings[0])
            known[role] = found[0] if found else self.vocab_size + len(added) - 1
        return self._extended(added, known)

    @abstractmethod
    def _special_id(self, spelling: str) -> int | None:
        """The id of a special token by its spelling."""
        ...

    @abstractmethod
    def _extended(self, spellings: Sequence[str], roles: dict[str, int]) -> Tokenizer:
        """The same tokenizer with these special tokens after its last id, and these roles."""
        ...

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds every id: uint16 or uint32."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (length,) of `dtype`, without special tokens. Many texts at once are faster.

        Raises `UserError` for lone surrogates, which are no Unicode text.
        """
        try:
            return self._encode(texts)
        except (UnicodeEncodeError, TypeError) as error:
            for text in texts:
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise UserError(
                        f"Text {text[:60]!r} holds a lone surrogate, which is no Unicode character; expected text "
                        "that can be written as UTF-8. Decode it with errors='replace' first."
                    ) from error
            raise

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def merges(self) -> np.ndarray | None:
        """(n, 3) int64: two ids and the one that they are merged to, first merges first; None: a vocabulary that is
        not made so."""
        return None

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """The text of these ids; bytes that are no UTF-8 become U+FFFD. Special tokens are spelled out or left out."""
        ...

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What the class's `_from_state` makes an equal tokenizer of, as plain JSON."""
        ...

    @classmethod
    @abstractmethod
    def _from_state(cls, state: dict[str, Any]) -> Self: ...

    def to_json(self) -> str:
        """The whole tokenizer as canonical JSON: equal tokenizers give equal strings."""
        content = {"kind": type(self).__name__, **self._state()}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote; `UserError` if this is none."""
        try:
            state = json.loads(text)
            kind = state.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                "This is not a tokenizer saved by lmexp; for one of the tokenizers library use tokenizer=pretrained "
                "tokenizer.path=FILE."
            ) from error
        classes = {"SubwordTokenizer": "subword", "CharTokenizer": "char", "ByteTokenizer": "byte"}
        if kind not in classes:
            raise UserError(f"Tokenizer of kind {kind!r}; expected one of {', '.join(classes)}. Was it saved by lmexp?")
        return getattr(import_module(f"lmexp.tokenizer.{classes[kind]}"), kind)._from_state(state)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into a folder, which is made if need be; returns the file."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a folder, or file, that `save` wrote."""
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            return Tokenizer.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read the tokenizer {path}: {error}. Give the path of a saved one.") from error

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def check_vocab_size(vocab_size: int, least: int) -> None:
    """Raise `UserError` if a subword vocabulary is too small for what it must hold."""
    if vocab_size < least:
        raise UserError(f"tokenizer.vocab_size={vocab_size}; expected at least {least}, for example 4096.")
