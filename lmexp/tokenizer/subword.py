"""Subword tokenizers of any algorithm, run by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmexp.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_PIECE = 2**17  # characters; longer texts are cut for the threads, and because each token costs some 100 bytes
_SEAM = re.compile(r"(?<=\w)(?=\n)")
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_PROBE = "a  b\n\n\tÀ\u0301é\u00a0ﬁ①\x00\ufeff\ud7ff\U0001f469\u200d\U0001f680 <|endoftext|> Don't 12345"


class SubwordTokenizer(Tokenizer):
    """Wraps a `tokenizers.Tokenizer`, whose own threads encode a batch of texts in parallel."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos: str,
        pad: str | None,
        unk: str | None,
        roles: dict[str, int] | None = None,
    ) -> None:
        """`eos`, `pad` and `unk` are the spellings of special tokens in the backend's vocabulary."""
        backend.encode_special_tokens = True  # text that spells one is text; not kept in the backend's JSON
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._backend_state = json.loads(backend.to_str())
        self._spelled = {"eos": eos, "pad": pad, "unk": unk}
        self.roles = dict(roles or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = backend.token_to_id(eos)
        assert eos_id is not None, eos
        self.eos_id = eos_id
        pad_id = None if pad is None else backend.token_to_id(pad)
        self.pad_id = eos_id if pad_id is None else pad_id
        self.unk_id = None if unk is None else backend.token_to_id(unk)
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special} | {eos_id}
        alphabet = _byte_alphabet()
        self._byte_level = alphabet <= set(backend.get_vocab(with_added_tokens=False))
        self.token_bytes = self._sizes(alphabet)
        self.lossless = self._byte_level and self.decode(self._encode([_PROBE])[0]) == _PROBE

    def _special_id(self, spelling: str) -> int | None:
        i = self.backend.token_to_id(spelling)
        return i if i in self._special else None

    def _extended(self, spellings: Sequence[str], roles: dict[str, int]) -> SubwordTokenizer:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(json.dumps(self._backend_state))
        backend.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in spellings])
        state = json.loads(backend.to_str())
        # the library may write a float one bit off when it reads and writes again
        state["model"] = self._backend_state["model"]
        longer = SubwordTokenizer(backend, **self._spelled, roles=roles)  # type: ignore[arg-type]
        longer._backend_state = state
        return longer

    def _sizes(self, alphabet: set[str]) -> np.ndarray:
        """(vocab_size,) bytes an id stands for: its spelling's letters each are a byte in byte-level vocabularies."""
        added = self.backend.get_added_tokens_decoder()
        prefix = getattr(self.backend.model, "continuing_subword_prefix", None) or ""
        sizes = np.zeros(self.vocab_size, dtype=np.float32)
        for spelling, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i == self.unk_id:
                sizes[i] = 1  # some text, at least a byte
            elif i in self._special:
                continue
            elif i in added:
                sizes[i] = len(spelling.encode()) + bool(prefix)  # spelled as it stands, after the space before it
            elif self._byte_level and alphabet.issuperset(spelling):
                sizes[i] = len(spelling)
            elif _BYTE_FALLBACK.fullmatch(spelling):
                sizes[i] = 1
            elif prefix:  # a piece that starts a word also stands for the space before it
                continues = spelling.startswith(prefix)
                sizes[i] = len(spelling.encode()) - len(prefix.encode()) if continues else len(spelling.encode()) + 1
            else:
                sizes[i] = len(spelling.replace("▁", " ").encode())
        return sizes

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        counts = []
        for text in texts:
            cut = _cut(text) if self._byte_level else [text]
            pieces += cut
            counts.append(len(cut))
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        ids = iter([np.array(encoding.ids, dtype=self.dtype) for encoding in encodings])
        parts = [[next(ids) for _ in range(count)] for count in counts]
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def merges(self) -> np.ndarray | None:
        model = self._backend_state["model"]
        if model["type"] != "BPE":
            return None
        ids, mark = model["vocab"], model["continuing_subword_prefix"] or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        made = [(ids[a], ids[b], ids[a + b.removeprefix(mark)]) for a, b in pairs]
        return np.array(made, dtype=np.int64).reshape(-1, 3)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _state(self) -> dict[str, Any]:
        roles = {"roles": self.roles} if self.roles else {}
        return {"special": self._spelled, "tokenizers": self._backend_state, **roles}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> SubwordTokenizer:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(json.dumps(state["tokenizers"]))
        tokenizer = cls(backend, **state["special"], roles=state.get("roles"))
        tokenizer._backend_state = state["tokenizers"]  # as saved: the library may read a float one bit off
        return tokenizer


def _cut(text: str) -> list[str]:
    """Cut a long text before line ends that follow a letter: byte-level pre-tokenizers split there anyway, so the
    tokens stay the same."""
    pieces = []
    start = 0
    while len(text) - start > _PIECE:
        seam = _SEAM.search(text, start + _PIECE)
        if seam is None:
            break
        pieces.append(text[start : seam.start()])
        start = seam.start()
    pieces.append(text[start:])
    return pieces


def _byte_alphabet() -> set[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
