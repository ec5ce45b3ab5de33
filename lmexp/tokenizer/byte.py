"""Bytes: 256 tokens that spell any text, and the one that ends documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmexp.tokenizer.tokenizer import EOS, Tokenizer


class ByteTokenizer(Tokenizer):
    """Id 0 ends documents, id 1 + b is the UTF-8 byte b."""

    vocab_size = 257
    eos_id = pad_id = 0
    unk_id = None
    lossless = True

    def __init__(self) -> None:
        self.token_bytes = np.ones(self.vocab_size, dtype=np.float32)
        self.token_bytes[self.eos_id] = 0

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(self.dtype) + self.dtype(1) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        eos = b"" if skip_special else EOS.encode()
        parts = b"".join(eos if i == self.eos_id else bytes((int(i) - 1,)) for i in ids)
        return parts.decode(errors="replace")

    def _state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> ByteTokenizer:
        return cls()


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
