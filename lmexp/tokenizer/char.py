"""Characters: one token for each that the training text holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmexp.tokenizer.tokenizer import EOS, UNK, Tokenizer

_CODE_POINTS = 0x110000


class CharTokenizer(Tokenizer):
    """Id 0 ends documents, 1 stands for characters not seen in training, the others are characters by code point;
    special tokens of roles follow."""

    lossless = False
    eos_id = pad_id = 0
    unk_id = 1

    def __init__(self, characters: str, special: Sequence[str] = (), roles: dict[str, int] | None = None) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.special = tuple(special)
        self.roles = dict(roles or {})
        self._first = 2 + len(self.characters)
        self.vocab_size = self._first + len(self.special)
        points = np.frombuffer(self.characters.encode("utf-32-le"), dtype=np.uint32)
        self._table = np.full(_CODE_POINTS, self.unk_id, dtype=self.dtype)  # code point -> id
        self._table[points] = np.arange(2, self._first)
        # an unknown character is at least a byte: bits per byte can only come out too high
        sizes = [0, 1, *(len(character.encode()) for character in self.characters), *(0 for _ in self.special)]
        self.token_bytes = np.array(sizes, dtype=np.float32)
        self._spelling = [EOS, UNK, *self.characters, *self.special]

    def _special_id(self, spelling: str) -> int | None:
        return self._first + self.special.index(spelling) if spelling in self.special else None

    def _extended(self, spellings: Sequence[str], roles: dict[str, int]) -> CharTokenizer:
        return CharTokenizer(self.characters, [*self.special, *spellings], roles)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        hidden = {self.eos_id, *range(self._first, self.vocab_size)} if skip_special else set()
        return "".join(self._spelling[i] for i in ids if int(i) not in hidden)

    def _state(self) -> dict[str, Any]:
        return {"characters": self.characters} | (
            {"special": list(self.special), "roles": self.roles} if self.special else {}
        )

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> CharTokenizer:
        return cls(state["characters"], state.get("special", ()), state.get("roles"))


@dataclass
class Char:
    """One token for each character of the training split; others become `<|unk|>`."""

    needs_text = True

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "char"}

    def train(self, texts: Iterator[str], progress: bool = False) -> CharTokenizer:
        """Collect the characters of these documents."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(characters))
