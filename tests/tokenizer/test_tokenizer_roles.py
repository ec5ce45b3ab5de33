"""Special tokens for roles: after the ids of text, or those that the vocabulary has."""

from __future__ import annotations

import numpy as np
import pytest

from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte
from lmexp.tokenizer.char import Char
from lmexp.tokenizer.tokenizer import Tokenizer
from lmexp.tokenizer.unigram import Unigram
from lmexp.tokenizer.wordpiece import WordPiece

TEXTS = [f"the {word} of {i} words, and <|mask|> is text" for i, word in enumerate(["cat", "dog", "tree"] * 40)]
KINDS = [Byte(), Char(), BPE(vocab_size=300), WordPiece(vocab_size=120), Unigram(vocab_size=120)]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: type(c).__name__)
def test_roles_get_ids_after_those_of_text(config) -> None:
    plain = config.train(iter(TEXTS))
    longer = plain.with_roles(("mask", "cls", "sentinel_3"))
    n = plain.vocab_size
    assert longer.roles == {"mask": n, "cls": n + 1, "sentinel_3": n + 2}
    assert longer.vocab_size == n + 3
    assert longer.token_bytes.tolist() == [*plain.token_bytes.tolist(), 0, 0, 0]
    for a, b in zip(plain.encode(TEXTS), longer.encode(TEXTS), strict=True):
        assert np.array_equal(a, b), "text that spells a special token stays text"
    ids = [*longer.encode(["the cat"])[0].tolist(), n, n + 2]
    assert longer.decode(ids).rstrip().endswith("<extra_id_3>")
    assert "<|mask|>" in longer.decode(ids)
    assert longer.decode(ids, skip_special=True).strip() == longer.decode(ids[:-2]).strip()
    assert longer.with_roles(("cls",)) is longer
    more = longer.with_roles(("sep",))
    assert more.roles == {**longer.roles, "sep": n + 3}
    again = Tokenizer.from_json(more.to_json())
    assert again.to_json() == more.to_json()
    assert again.roles == more.roles
    assert again.vocab_size == n + 4


def test_a_vocabulary_that_spells_a_role_keeps_its_id() -> None:
    from tokenizers import AddedToken

    from lmexp.tokenizer.subword import SubwordTokenizer

    plain = WordPiece(vocab_size=120).train(iter(TEXTS))
    plain.backend.add_special_tokens([AddedToken("[MASK]", special=True)])
    known = SubwordTokenizer(plain.backend, eos="<|endoftext|>", pad=None, unk="<|unk|>")
    with_mask = known.with_roles(("mask", "cls"))
    assert with_mask.roles["mask"] == known.backend.token_to_id("[MASK]")
    assert with_mask.roles["cls"] == known.vocab_size
