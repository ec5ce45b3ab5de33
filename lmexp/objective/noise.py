"""Randomness of objectives, and what they need to know of a vocabulary."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np


def generator(seed: int, index: int) -> np.random.Generator:
    """The randomness of sample `index`: a pure function of both (Philox, Salmon et al. 2011, counts from the key)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """(parts,) positive whole numbers that sum to `total`, each such list equally likely."""
    edges = np.zeros(parts + 1, dtype=np.int64)
    edges[1:-1] = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    edges[-1] = total
    return edges[1:] - edges[:-1]


def ordinary(tokenizer: Any) -> np.ndarray:
    """(n,) the ids that stand for text: no special ones, and not the unknown one."""
    text = np.asarray(tokenizer.token_bytes) > 0
    if tokenizer.unk_id is not None:
        text[tokenizer.unk_id] = False
    return np.flatnonzero(text)


def spellings(tokenizer: Any) -> list[str]:
    """The text of each id (V,), with a space before pieces that start a word."""
    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    prefix = getattr(backend.model, "continuing_subword_prefix", None)
    spelled = []
    for i in range(tokenizer.vocab_size):
        token = backend.id_to_token(i) or ""
        if prefix:
            spelled.append(token.removeprefix(prefix) if token.startswith(prefix) else f" {token}")
        else:
            spelled.append(token.replace("▁", " ") if "▁" in token else tokenizer.decode([i]))
    return spelled


def word_edges(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two (V,) bool: ids whose text begins, and ends, inside a word; a space by itself belongs to the word after it. A
    token goes on with the word before it where that ends and it begins so. Vocabularies that mark the pieces that go on
    (WordPiece) are taken at their word."""
    backend = getattr(tokenizer, "backend", None)
    prefix = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)
    if prefix:
        tokens = [backend.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]  # type: ignore[union-attr]
        return np.array([token.startswith(prefix) for token in tokens]), np.ones(len(tokens), dtype=bool)
    inside = [[_in_word(text[:1]), _in_word(text[-1:]) or text == " "] for text in spellings(tokenizer)]
    begins, ends = np.array(inside, dtype=bool).T
    return begins, ends


def _in_word(character: str) -> bool:
    """Letters, numbers and the marks that stand on letters (vowel signs of Indic scripts, say)."""
    return character in ("_", "\ufffd") or (character != "" and unicodedata.category(character)[0] in "LNM")


def sentence_ends(tokenizer: Any) -> np.ndarray:
    """(V,) bool: ids after which a sentence ends: a full stop, an exclamation or question mark, or a line end."""
    texts = spellings(tokenizer)
    return np.array([text.rstrip().endswith((".", "!", "?")) or "\n" in text for text in texts], dtype=bool)
