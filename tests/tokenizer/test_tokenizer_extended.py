"""New words in a trained vocabulary: whole words only, old ids as they were, nothing lost, fewer tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.contracts import UserError
from lmexp.tokenizer import extended
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte
from lmexp.tokenizer.char import Char
from lmexp.tokenizer.extended import Extended, pieces, report, takes_whole_words
from lmexp.tokenizer.subword import SubwordTokenizer
from lmexp.tokenizer.tokenizer import EOS, UNK, Tokenizer
from lmexp.tokenizer.unigram import Unigram
from lmexp.tokenizer.wordpiece import WordPiece

RANDOM = np.random.default_rng(0)
SENTENCE = "the cat sat on mat while another watched them sitting there quietly and then left (it was naive)"
TERMS = "thrombosis anaemia naïve Überdruck кровь embolus embolism hepatic cardiac stenosis"
PLAIN, MEDICAL = SENTENCE.split(), TERMS.split()
LETTERS = [*"abcdefghijklmnopqrstuvwxyz-.,'ÜТ", *(word[::-1] + word[-1] for word in MEDICAL)]
"""Every letter, at the beginning and inside of words, so that nothing is unknown."""


def sentences(words: list[str], n: int) -> list[str]:
    return [" ".join(RANDOM.choice(words, 12)) + ".\n" for _ in range(n)]


OLD_TEXTS = [*sentences(PLAIN, 200), " ".join(2 * LETTERS)]
NEW_TEXTS = sentences(PLAIN + 2 * MEDICAL, 150)
HELD_OUT = sentences(PLAIN + 2 * MEDICAL, 50)


def unsplit() -> SubwordTokenizer:
    """Byte-level BPE that does not cut text into words, so that a word can be an added token only."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False, max_token_length=6
    )
    backend.train_from_iterator(OLD_TEXTS, trainer)
    return SubwordTokenizer(backend, eos=EOS, pad=None, unk=None)


MAKE = {
    "bpe": lambda: BPE(300).train(iter(OLD_TEXTS)),
    "bpe_roles": lambda: BPE(300).train(iter(OLD_TEXTS)).with_roles(("mask", "sentinel_0")),
    "unsplit": unsplit,
    "wordpiece": lambda: WordPiece(150).train(iter(OLD_TEXTS)),
    "unigram": lambda: Unigram(120).train(iter(OLD_TEXTS)).with_roles(("mask",)),
}
LOSSLESS = ("bpe", "bpe_roles", "unsplit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def bases(folder):
    made = {name: make() for name, make in MAKE.items()}
    for name, base in made.items():
        base.save(folder / name)
    return made


@pytest.fixture(scope="module")
def learned(bases, folder):
    return {
        name: Extended(str(folder / name), n_tokens=9, min_frequency=5).train(iter(NEW_TEXTS), progress=False)
        for name in bases
    }


@pytest.mark.parametrize("name", MAKE)
def test_texts_of_a_new_domain_become_shorter(bases, learned, name) -> None:
    measured = report(bases[name], learned[name], HELD_OUT)
    before, after = measured.tokens_per_word
    assert after < 0.75 * before
    assert measured.bytes_per_token[1] > 1.3 * measured.bytes_per_token[0]
    if name != "unsplit":  # whose pieces reach from one word into the next
        before, after = report(bases[name], learned[name], OLD_TEXTS[:-1]).tokens
        assert after <= before


@pytest.mark.parametrize("name", MAKE)
def test_old_ids_keep_their_meaning(bases, learned, name) -> None:
    old, new = bases[name], learned[name]
    n = old.vocab_size
    assert new.vocab_size == n + 9
    assert new.backend.get_vocab(True).items() >= old.backend.get_vocab(True).items()
    assert (new.token_bytes[:n] == old.token_bytes).all()
    assert (new.eos_id, new.pad_id, new.unk_id, new.roles) == (old.eos_id, old.pad_id, old.unk_id, old.roles)
    assert new.lossless == old.lossless
    assert [new.decode([i]) for i in range(n)] == [old.decode([i]) for i in range(n)]
    spelled = f"{EOS} <|mask|> <extra_id_0> [MASK]"
    assert (new.encode([spelled])[0] == old.encode([spelled])[0]).all(), "text that spells a special token stays text"
    words = [new.decode([i]).strip() for i in range(n, n + 9)]
    assert "thrombosis" in words
    if name != "wordpiece":  # which does not keep white space and can only estimate
        assert all(new.token_bytes[i] == len(new.decode([i]).encode()) for i in range(n, n + 9))


@pytest.mark.parametrize("name", MAKE)
def test_saving_and_roles(learned, name) -> None:
    new = learned[name]
    again = Tokenizer.from_json(new.to_json())
    assert again.to_json() == new.to_json()
    assert (again.token_bytes == new.token_bytes).all()
    role = new.with_roles(("mask", "cls", "sep"))
    known = role.roles["mask"] if "mask" in new.roles else new.vocab_size
    first = new.vocab_size + (known == new.vocab_size)
    assert role.roles == {**new.roles, "mask": known, "cls": first, "sep": first + 1}
    assert Tokenizer.from_json(role.to_json()).to_json() == role.to_json()
    for text in HELD_OUT:
        ids = new.encode([text])[0]
        assert (again.encode([text])[0] == ids).all()
        assert (role.encode([text])[0] == ids).all()
        assert (Tokenizer.from_json(role.to_json()).encode([text])[0] == ids).all()
    assert pieces(new, role) == [[]] * (role.vocab_size - new.vocab_size)


WORDS = st.sampled_from([*MEDICAL, *PLAIN, "embolisms", "xthrombosis", "don't", EOS, "<|mask|>", "\u0301", "\r\n", "_"])
TEXT = st.lists(st.one_of(st.text(max_size=4), WORDS, WORDS.map(lambda w: f" {w}"))).map("".join)


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_nothing_is_lost(learned, text) -> None:
    for name in LOSSLESS:
        ids = learned[name].encode([text])[0]
        assert learned[name].lossless
        assert learned[name].decode(ids) == text
        assert learned[name].token_bytes[ids].sum() == len(text.encode())
        assert learned[name].eos_id not in ids


def expanded(old: Tokenizer, new: Tokenizer, ids: np.ndarray) -> list[int]:
    """Ids with the pieces in the place of each new word."""
    parts = pieces(old, new)
    return [p for i in ids.tolist() for p in (parts[i - old.vocab_size] if i >= old.vocab_size else [i])]


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_a_new_word_stands_for_its_pieces_and_all_else_stays(bases, learned, text) -> None:
    for name in ("bpe", "bpe_roles"):
        assert expanded(bases[name], learned[name], learned[name].encode([text])[0]) == (
            bases[name].encode([text])[0].tolist()
        )


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*MEDICAL, *PLAIN, "embolisms", "-", ",", " ", "  ", "s", "a"])).map("".join))
def test_the_same_of_wordpiece(bases, learned, text) -> None:
    old, new = bases["wordpiece"], learned["wordpiece"]
    ids = old.encode([text])[0]
    if old.unk_id not in ids:
        assert expanded(old, new, new.encode([text])[0]) == ids.tolist()
        assert new.decode(new.encode([text])[0]) == old.decode(ids)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*MEDICAL, *PLAIN, "embolisms", "-", ",", " ", "  ", "s", "a"])).map("".join))
def test_unigram_writes_the_same_text(bases, learned, text) -> None:
    old, new = bases["unigram"], learned["unigram"]
    ids, more = old.encode([text])[0], new.encode([text])[0]
    if old.unk_id not in ids:
        assert new.decode(more) == old.decode(ids) == text
        assert new.token_bytes[more].sum() == len(text.encode())


@pytest.mark.parametrize("name", MAKE)
def test_whole_words_only(bases, learned, name) -> None:
    old, new = bases[name], learned[name]
    for text in ("a thrombosisx", "xthrombosis", "thrombosisthrombosis", "a ethrombosis", "a thrombosisé"):
        assert (new.encode([text])[0] == old.encode([text])[0]).all(), text
    for text in ("a thrombosis", "a thrombosis, a", "a thrombosis\na"):
        assert max(new.encode([text])[0]) >= old.vocab_size, text


def saved_by(old: Tokenizer, new: Tokenizer, texts: list[str]) -> int:
    before, after = report(old, new, texts).tokens
    return before - after


@pytest.mark.parametrize("name", ["bpe", "unsplit", "wordpiece", "unigram"])
def test_savings_are_what_is_saved(bases, name) -> None:
    """Each candidate's savings against adding it alone and counting; and all of them together against their sum."""
    old, texts = bases[name], NEW_TEXTS[:40]
    whole = takes_whole_words(old)
    assert whole == (name == "bpe")
    saved = (extended._saved_by_words if whole else extended._saved)(old, texts, 3)
    add = extended._with_entries if whole else extended._with_added_tokens
    if name == "unsplit":  # pieces across words: what is left behind may be merged otherwise
        assert sum(saved.values()) == pytest.approx(saved_by(old, add(old, sorted(saved)), texts), rel=0.1)
        return
    assert len(saved) > 8
    for word, tokens in saved.items():
        assert saved_by(old, add(old, [word]), texts) == tokens, word
    assert saved_by(old, add(old, sorted(saved)), texts) == sum(saved.values())


def test_the_choice_is_greedy_and_repeatable(bases, folder) -> None:
    """Step by step, the word whose adding shortens the text most; ties by spelling."""
    old, texts = bases["bpe"], NEW_TEXTS[:25]
    candidates = sorted({w for t in texts for w, _ in extended._cut(old, t) if any(c.isalpha() for c in w)})
    chosen: list[str] = []
    for _ in range(4):
        best = max(
            (w for w in candidates if w not in chosen and old.backend.token_to_id(w) is None),
            key=lambda w: (saved_by(old, extended._with_entries(old, [*chosen, w]), texts), [-ord(c) for c in w]),
        )
        chosen.append(best)
    config = Extended(str(folder / "bpe"), n_tokens=4, min_frequency=1)
    new = config.train(iter(texts))
    assert [new.backend.id_to_token(old.vocab_size + n) for n in range(4)] == chosen
    assert config.train(iter(texts[::-1])).fingerprint() == new.fingerprint()


def test_rare_words_are_not_learned(bases, folder) -> None:
    texts = ["a thrombosis" for _ in range(4)] + ["a hepatic" for _ in range(3)]
    for name in ("bpe", "wordpiece"):
        new = Extended(str(folder / name), min_frequency=4).train(iter(texts))
        assert [new.decode([i]).strip() for i in range(bases[name].vocab_size, new.vocab_size)] == ["thrombosis"]
        with pytest.raises(UserError, match=r"occurs 5 times.*min_frequency"):
            Extended(str(folder / name), min_frequency=5).train(iter(texts))


@pytest.mark.parametrize("name", MAKE)
def test_words_that_are_given(bases, folder, name) -> None:
    old = bases[name]
    config = Extended(str(folder / name), tokens=["stenosis", "anaemia"])
    assert not config.needs_text
    assert Extended(str(folder / name)).needs_text
    new = config.train(iter(()))
    spelled = ["stenosis", " stenosis", "anaemia", " anaemia"] if "bpe" in name else ["stenosis", "anaemia"]
    assert [new.decode([i]) for i in range(old.vocab_size, new.vocab_size)] == spelled
    assert max(new.encode(["stenosis"])[0]) == old.vocab_size
    assert pieces(old, new) == [ids.tolist() for ids in old.encode(spelled)]
    if old.unk_id is None:
        assert new.decode(new.encode(["(stenosis of anaemia)"])[0]) == "(stenosis of anaemia)"


def test_a_base_may_be_extended_twice(learned, folder) -> None:
    for name in ("bpe_roles", "unigram"):
        first = learned[name]
        first.save(folder / f"{name}_more")
        second = Extended(str(folder / f"{name}_more"), tokens=["quokka"]).train(iter(()))
        assert second.backend.get_vocab(True).items() >= first.backend.get_vocab(True).items()
        for text in HELD_OUT:
            assert (first.encode([text])[0] == second.encode([text])[0]).all()
        assert second.decode(second.encode(["a quokka"])[0]) == "a quokka"
        assert max(second.encode(["a quokka"])[0]) >= first.vocab_size


def test_a_special_token_that_is_a_word_stays_unwritable(tmp_path) -> None:
    """`ignore_merges` would take it from text; such a vocabulary gets added tokens instead."""
    base = BPE(300).train(iter(OLD_TEXTS))
    state = json.loads(base.backend.to_str())
    state["model"]["vocab"]["user"] = base.vocab_size
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(state))
    backend.add_special_tokens(["user"])
    base = SubwordTokenizer(backend, eos=EOS, pad=None, unk=None)
    assert not takes_whole_words(base)
    base.save(tmp_path)
    new = Extended(str(tmp_path), tokens=["stenosis"]).train(iter(()))
    assert base.backend.token_to_id("user") not in new.encode(["user user (user)"])[0]
    assert (new.encode(["user user"])[0] == base.encode(["user user"])[0]).all()
    assert new.decode(new.encode(["user stenosis"])[0]) == "user stenosis"


def test_a_vocabulary_that_normalizes(tmp_path) -> None:
    """Byte-level BPE over NFC, as Qwen's."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import normalizers

    backend = Backend.from_str(BPE(300).train(iter(OLD_TEXTS)).backend.to_str())
    backend.normalizer = normalizers.NFC()
    base = SubwordTokenizer(backend, eos=EOS, pad=None, unk=None)
    assert takes_whole_words(base)
    base.save(tmp_path)
    new = Extended(str(tmp_path), n_tokens=1, min_frequency=2).train(iter(["a nai\u0308ve"] * 3))
    assert new.encode([" nai\u0308ve"])[0].tolist() == new.encode([" naïve"])[0].tolist() == [base.vocab_size]
    assert pieces(base, new) == [base.encode([" naïve"])[0].tolist()]


def test_where_the_base_is_looked_for(bases, folder, tmp_path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-000000001.ckpt").write_bytes(b"")
    places = (run, run / "checkpoints", run / "checkpoints" / "step-000000001.ckpt")
    for place in places:
        with pytest.raises(UserError, match=r"no tokenizer\.json in .*run;"):
            Extended(str(place), tokens=["stenosis"]).train(iter(()))
    bases["bpe"].save(run)
    made = {Extended(str(p), tokens=["stenosis"]).train(iter(())).fingerprint() for p in places}
    keys = {json.dumps(Extended(str(p), n_tokens=3).key) for p in (*places, run / "tokenizer.json", folder / "bpe")}
    assert len(made) == len(keys) == 1
    assert Extended(str(run), n_tokens=4).key != Extended(str(run), n_tokens=3).key
    assert Extended(str(folder / "bpe_roles"), n_tokens=3).key != Extended(str(run), n_tokens=3).key


def test_mistakes(bases, folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.base is not given"):
        Extended(None)
    for key in ("n_tokens", "min_frequency"):
        with pytest.raises(UserError, match=rf"tokenizer\.{key}=0"):
            Extended("x", **{key: 0})
    for tokens in ([], [" "]):
        with pytest.raises(UserError, match=r"tokenizer\.tokens="):
            Extended("x", tokens=tokens)
    for config in (Byte(), Char()):
        path = config.train(iter(OLD_TEXTS)).save(tmp_path)
        with pytest.raises(UserError, match=r"(Byte|Char)Tokenizer; .*subword"):
            Extended(str(path)).train(iter(NEW_TEXTS))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.base=.*no tokenizer could be loaded"):
        Extended(str(tmp_path)).train(iter(NEW_TEXTS))
    with pytest.raises(UserError, match=r"'New York' is not one word"):
        Extended(str(folder / "bpe"), tokens=["New York"]).train(iter(()))
    with pytest.raises(UserError, match=r"'New York' cannot be one token"):
        Extended(str(folder / "unigram"), tokens=["New York"]).train(iter(()))
    with pytest.raises(UserError, match=r"'a_stenosis' cannot be one token"):
        Extended(str(folder / "wordpiece"), tokens=["a_stenosis"]).train(iter(()))
    with pytest.raises(UserError, match=r"'naïve' cannot be one token"):
        Extended(str(folder / "unsplit"), tokens=["naïve"]).train(iter(()))
    with pytest.raises(UserError, match="already"):
        Extended(str(folder / "bpe"), tokens=[" the"]).train(iter(()))
    with pytest.raises(UserError, match="not the old one"):
        pieces(bases["bpe_roles"], bases["bpe"])
    with pytest.raises(UserError, match="not the old one"):
        pieces(Byte().train(iter(())), bases["bpe"])


def test_roles_of_bytes_and_characters_have_no_pieces() -> None:
    for config in (Byte(), Char()):
        old = config.train(iter(OLD_TEXTS))
        assert pieces(old, old.with_roles(("mask", "cls"))) == [[], []]
        with pytest.raises(UserError, match="not the old one"):
            pieces(old.with_roles(("mask",)), old)


def test_a_tokenizer_that_marks_every_part_of_a_text_is_refused(tmp_path) -> None:
    """As T5's: what follows an added word would get a space of its own."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend.from_str(Unigram(120).train(iter(OLD_TEXTS)).backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    SubwordTokenizer(backend, eos=EOS, pad=None, unk=UNK).save(tmp_path)
    with pytest.raises(UserError, match=r"puts a sign before each part"):
        Extended(str(tmp_path), tokens=["stenosis"]).train(iter(()))


def test_report() -> None:
    old = Byte().train(iter(()))
    measured = report(old, old, ["ab cd", "é"])
    assert (measured.words, measured.n_bytes, measured.tokens) == (3, 7, (7, 7))
    assert measured.tokens_per_word == pytest.approx((7 / 3, 7 / 3))
    assert measured.bytes_per_token == (1, 1)
