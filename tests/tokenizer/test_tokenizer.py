"""Tokenizers: lossless on any Unicode, sizes in bytes that add up, equal after saving."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.contracts import UserError
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte
from lmexp.tokenizer.char import Char
from lmexp.tokenizer.pretrained import Pretrained
from lmexp.tokenizer.subword import _PIECE
from lmexp.tokenizer.tokenizer import EOS, UNK, Tokenizer
from lmexp.tokenizer.unigram import Unigram
from lmexp.tokenizer.wordpiece import WordPiece

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "while",
    "another",
    "cat",
    "watched",
    "them",
    "sitting",
    "there",
    "quietly",
    "and",
    "then",
    "left",
]
RANDOM = np.random.default_rng(0)
DOCUMENTS = [" ".join(RANDOM.choice(WORDS, 40)) + ".\n" for _ in range(200)]
CONFIGS = {
    "byte": Byte(),
    "char": Char(),
    "bpe": BPE(300),
    "wordpiece": WordPiece(100),
    "unigram": Unigram(100),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: config.train(iter(DOCUMENTS)) for name, config in CONFIGS.items()}


# any Unicode, with what is apt to go wrong made likely
ODD = st.sampled_from([EOS, UNK, "\x00", "\ufeff", "\ud7ff", "\ue000", "\ufffe", "\u0301", "\r\n", "\u2028", "  "])
TEXT = st.lists(st.one_of(st.text(), ODD)).map("".join)


@settings(deadline=None, max_examples=200)
@given(TEXT)
def test_byte_and_bpe_spell_any_text(tokenizers, text):
    for name in ("byte", "bpe"):
        tokenizer = tokenizers[name]
        (ids,) = tokenizer.encode([text])
        assert tokenizer.lossless
        assert tokenizer.unk_id is None
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="".join(sorted(set("".join(DOCUMENTS)))) + "<|endoftext|>"))
def test_char_spells_what_it_was_trained_on(text):
    tokenizer = Char().train(iter([*DOCUMENTS, EOS]))
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.eos_id, tokenizer.unk_id} & set(ids.tolist())


def test_unknown_characters(tokenizers):
    (ids,) = tokenizers["char"].encode(["t☃\U0001f680e"])
    assert ids.tolist()[1:3] == [tokenizers["char"].unk_id] * 2
    assert tokenizers["char"].decode(ids) == f"t{UNK}{UNK}e"
    for name in ("wordpiece", "unigram"):
        (ids,) = tokenizers[name].encode(["☃"])
        assert tokenizers[name].unk_id in ids


@pytest.mark.parametrize("name", CONFIGS)
def test_contract(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.eos_id == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.float32
    assert tokenizer.token_bytes[0] == 0
    encoded = tokenizer.encode(DOCUMENTS)
    assert all(ids.dtype == tokenizer.dtype for ids in encoded)
    assert max(ids.max() for ids in encoded) < tokenizer.vocab_size
    assert all((one == many).all() for one, many in zip(tokenizer.encode(DOCUMENTS[:3]), encoded, strict=False))
    estimate = sum(tokenizer.token_bytes[ids].sum() for ids in encoded)
    assert estimate == pytest.approx(sum(len(d) for d in DOCUMENTS), rel=0 if tokenizer.lossless else 0.1)
    assert tokenizer.decode([0]) == EOS
    assert tokenizer.decode([0], skip_special=True) == ""
    assert tokenizer.encode([""])[0].size == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_saving(tokenizers, name, tmp_path):
    tokenizer = tokenizers[name]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.lossless == tokenizer.lossless
    text = DOCUMENTS[0] + EOS
    assert (loaded.encode([text])[0] == tokenizer.encode([text])[0]).all()
    assert (loaded.token_bytes == tokenizer.token_bytes).all()
    assert len({t.fingerprint() for t in tokenizers.values()}) == len(CONFIGS)


def test_bpe_is_deterministic(tokenizers):
    assert BPE(300).train(iter(DOCUMENTS)).fingerprint() == tokenizers["bpe"].fingerprint()


def test_long_texts_are_cut_without_changing_their_tokens(tokenizers):
    lines = ["".join(RANDOM.choice([*WORDS, "\n", " ", "\n\n  ", "!", "\t"], 30)) for _ in range(4000)]
    text = "\n".join(lines)
    assert len(text) > 2 * _PIECE
    whole = tokenizers["bpe"].backend.encode(text, add_special_tokens=False).ids
    assert tokenizers["bpe"].encode([text])[0].tolist() == whole


def test_a_megabyte_of_characters_is_fast(tokenizers):
    text = "".join(DOCUMENTS)
    text = text * (1_100_000 // len(text))
    start = time.perf_counter()
    tokenizers["char"].encode([text])
    assert time.perf_counter() - start < 0.5


def test_mistakes(tokenizers, tmp_path):
    for name in CONFIGS:
        with pytest.raises(UserError, match="surrogate"):
            tokenizers[name].encode(["fine", "a\ud800"])
    with pytest.raises(UserError, match=r"vocab_size=256.*257"):
        BPE(256)
    with pytest.raises(UserError, match="not a tokenizer saved by lmexp"):
        Tokenizer.from_json('{"model": 1}')
    with pytest.raises(UserError, match=r"no\.json"):
        Tokenizer.load(tmp_path / "no.json")
    with pytest.raises(UserError, match=r"tokenizer.path=gpt2"):
        Pretrained(None)


def hf_backend(kind):
    import tokenizers as hf

    if kind == "wordlevel":
        return hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "[END]": 2}, unk_token="a"))
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.post_processor = hf.processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[(EOS, 300)])
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        DOCUMENTS, hf.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([EOS, "<|padding|>"])
    return backend


@pytest.mark.parametrize("folder", [True, False])
def test_pretrained(tmp_path, folder):
    backend = hf_backend("bpe")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Pretrained(str(tmp_path if folder else tmp_path / "tokenizer.json")).train(iter(()))
    assert tokenizer.lossless
    assert tokenizer.eos_id == backend.token_to_id(EOS)
    assert tokenizer.pad_id == backend.token_to_id("<|padding|>")
    text = DOCUMENTS[0] + EOS
    (ids,) = tokenizer.encode([text])
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text)
    (again,) = Tokenizer.from_json(tokenizer.to_json()).encode([text])
    assert (again == ids).all()


def test_pretrained_finds_the_document_end(tmp_path):
    hf_backend("wordlevel").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no known token that ends documents.*tokenizer.eos=TOKEN"):
        Pretrained(str(tmp_path)).train(iter(()))
    assert Pretrained(str(tmp_path), eos="[END]").train(iter(())).eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[END]"}}')
    assert Pretrained(str(tmp_path)).train(iter(())).eos_id == 2
    with pytest.raises(UserError, match="not in the vocabulary"):
        Pretrained(str(tmp_path), eos="nope").train(iter(()))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        Pretrained(str(tmp_path)).train(iter(()))


def test_pretrained_of_ours(tokenizers, tmp_path):
    path = tokenizers["char"].save(tmp_path)
    assert Pretrained(str(path)).train(iter(())).fingerprint() == tokenizers["char"].fingerprint()
