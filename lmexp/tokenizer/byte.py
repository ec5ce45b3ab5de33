"""Bytes: 256 tokens that spell any text, and the one that ends documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmexp.tokenizer.tokenizer import EOS, Tokenizer


class ByteTokenizer(Tokenizer):
    """Id 0 ends documents, id 1 + b is the UTF-8 byte b; special tokens of roles follow."""

    eos_id = pad_id = 0
    unk_id = None
    lossless = True

    def __init__(self, special: Sequence[str] = (), roles: dict[str, int] | None = None) -> None:
        """`special` are the spellings of the ids from 257 on."""
        self.special = tuple(special)
        self.roles = dict(roles or {})
        self.vocab_size = 257 + len(self.special)
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.float32)
        self.token_bytes[1:257] = 1

    def _special_id(self, spelling: str) -> int | None:
        return 257 + self.special.index(spelling) if spelling in self.special else None

    def _extended(self, spellings: Sequence[str], roles: dict[str, int]) -> ByteTokenizer:
        return ByteTokenizer([*self.special, *spellings], roles)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(self.dtype) + self.dtype(1) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        special = {self.eos_id: EOS, **{257 + n: spelling for n, spelling in enumerate(self.special)}}
        spelled = {i: b"" if skip_special else spelling.encode() for i, spelling in special.items()}
        parts = b"".join(spelled[int(i)] if int(i) in spelled else bytes((int(i) - 1,)) for i in ids)
        return parts.decode(errors="replace")

    def _state(self) -> dict[str, Any]:
        return {"special": list(self.special), "roles": self.roles} if self.special else {}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> ByteTokenizer:
        return cls(state.get("special", ()), state.get("roles"))


@dataclass
class Byte:
    """UTF-8 bytes; nothing to train."""

    needs_text = False

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "byte"}

    def train(self, texts: Iterator[str], progress: bool = False) -> ByteTokenizer:
        """There is only one."""
        return ByteTokenizer()
