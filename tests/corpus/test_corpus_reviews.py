"""The embedded corpus of synthetic product reviews."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import pytest

from lmexp.contracts import UserError
from lmexp.corpus.reviews import (
    COMPARISON,
    CONTRAST,
    HELD_OUT,
    KNOWN,
    NEGATION,
    NEW_WORDS,
    OTHERS,
    PLAIN,
    WORDS,
    Reviews,
)

SMALL = {"examples": 2000, "validation": 100, "test": 101}
DIGEST = "89b1c9e994e6daa8577e728ded03427c2f09b397f5ecaa47e80dbe16336fd1eb"
"""Of the small corpus. If the grammar is changed on purpose, change `_VERSION` with it, or old caches are used."""


@pytest.fixture(scope="module")
def corpus():
    return Reviews()


@pytest.fixture(scope="module")
def small():
    return Reviews(**SMALL)


def in_group(corpus, group):
    return [review for review in corpus.reviews["test"] if corpus.groups[review.group] == group]


def everything(corpus):
    return [review for split in corpus.splits for review in corpus.reviews[split]]


def contains(words, text):
    return re.search(rf"\b(?:{'|'.join(map(re.escape, words))})\b", text, re.IGNORECASE)


def test_splits_have_their_sizes_and_types(corpus):
    assert corpus.splits == ("train", "validation", "test")
    assert {split: len(corpus.rows(split)) for split in corpus.splits} == {
        "train": 12_000,
        "validation": 1000,
        "test": 3000,
    }
    for split in corpus.splits:
        rows = corpus.rows(split)
        assert {name: feature.dtype for name, feature in rows.features.items()} == {
            "text": "large_string",
            "label": "int64",
            "group": "int64",
        }
        expected = [(review.text, review.label, review.group) for review in corpus.reviews[split]]
        assert list(zip(rows["text"], rows["label"], rows["group"], strict=True)) == expected
        assert set(rows["group"]) == ({0, 1, 2} if split == "test" else {0})
    assert [len(in_group(corpus, group)) for group in corpus.groups] == [1000, 1000, 1000]


@pytest.mark.parametrize("which", ["corpus", "small"])
def test_labels_are_balanced(which, request):
    corpus = request.getfixturevalue(which)
    for split in corpus.splits:
        for group in {review.group for review in corpus.reviews[split]}:
            labels = [review.label for review in corpus.reviews[split] if review.group == group]
            assert abs(labels.count(1) - labels.count(0)) <= 1
            assert abs(sum(labels) / len(labels) - 0.5) < 0.01


def test_no_text_stands_twice(corpus):
    texts = [review.text for review in everything(corpus)]
    assert len(set(texts)) == len(texts)


def test_held_out_templates_are_in_one_group_alone(corpus):
    assert not set(HELD_OUT) & set(KNOWN)
    held_out = in_group(corpus, "templates")
    assert {review.templates[0] for review in held_out} == set(HELD_OUT)
    others = [review for review in everything(corpus) if review not in held_out]
    assert {template for review in others for template in review.templates} == set(KNOWN)


def test_held_out_words_are_in_one_group_alone(corpus):
    new = {word for kind in NEW_WORDS.values() for side in kind for phrase in side for word in phrase.split()}
    old = [word for kind in ("J", "X", "N", "V", "F", "P", "C") for side in WORDS[kind] for word in side]
    with_new = in_group(corpus, "words")
    for review in everything(corpus):
        assert bool(contains(new, review.text)) == (review.group == 2), review
    for review in with_new:
        assert not contains(old, review.text), review
    words = {word for side in NEW_WORDS.values() for words in side for word in words}
    assert all(any(contains([word], review.text) for review in with_new) for word in words)


def test_training_has_all_that_it_is_said_to_have(corpus, small):
    """Even the smallest, which the others begin with."""
    assert corpus.reviews["train"][:2000] == small.reviews["train"]
    assert {template for review in small.reviews["train"] for template in review.templates} == set(KNOWN)
    text = "\n".join(review.text for review in small.reviews["train"])
    known = [word for kind, sides in WORDS.items() if kind != "R" for side in sides for word in side]
    for word in [*known, *OTHERS["n"], *OTHERS["a"], *OTHERS["i"], *OTHERS["h"]]:
        assert contains([word], text), word


def test_words_have_one_polarity():
    for kinds in (WORDS, NEW_WORDS):
        words = [word for kind, sides in kinds.items() if kind != "R" for side in sides for word in side]
        assert len(set(words)) == len(words)


def test_the_text_is_english_to_the_eye(corpus):
    for review in everything(corpus):
        assert not re.search(r"[{}]|  |\b[Aa] [aeio]|\b[Aa] u(?!se)|\b[Aa]n (?![aeiou])|\ban use", review.text), review
        assert review.text[-1] in ".!"
        sentences = re.split(r"(?<=[.!]) ", review.text)
        assert 1 <= len(sentences) <= 3
        assert all(sentence[0].isupper() for sentence in sentences)


def pattern(template):
    """A regular expression of a template's texts, with the slots that have a polarity, and those."""
    signed = []

    def either(words):
        return "(?:" + "|".join(words) + ")"

    def of(piece):
        slot = re.fullmatch(r"\{(\w+)([+-]?)\}", piece)
        if not slot:
            return re.escape(piece)
        kind, sign = slot.groups()
        products, aspects = either(OTHERS["n"]), either(OTHERS["a"])
        if kind == "s":
            return f"(?:{either(OTHERS['d'])} {products}|the {aspects})"
        if not sign:
            return either(OTHERS[kind]).replace("{n}", products)
        signed.append((kind, sign))
        if kind == "x":
            asides = (pattern(plain)[0] for plain in PLAIN if "{s}" in plain)
            return "(" + either(re.sub(r"\((?!\?)", "(?:", aside) for aside in asides) + ")"
        words = [word for side in WORDS[kind] for word in side] if kind != "y" else [".+"]
        return "(" + either(words).replace("{n}", products) + ")"

    return "".join(of(piece) for piece in re.split(r"(\{\w+[+-]?\})", template)), signed


def readings(opinion):
    """The labels that the grammar gives an opinion: by each template that it is an instance of."""
    labels = set()
    for template in (*KNOWN, *HELD_OUT):
        expression, signed = pattern(template)
        if match := re.fullmatch(expression, opinion):
            for label in (0, 1):
                polarities = [label if sign == "+" else 1 - label for _, sign in signed]
                if all(
                    polarity in readings(said)
                    if kind in "xy"
                    else any(re.fullmatch(word.replace("{n}", r"[\w ]+"), said) for word in WORDS[kind][polarity])
                    for (kind, _), said, polarity in zip(signed, match.groups(), polarities, strict=True)
                ):
                    labels.add(label)
    return labels


@pytest.mark.parametrize(
    ("opinion", "label"),
    [
        ("the kettle is reliable", 1),
        ("the kettle is very reliable", 1),
        ("the lid is utterly dreadful", 0),
        ("my toaster is not reliable", 0),
        ("this toaster is not flimsy", 1),
        ("the kettle is never noisy", 1),
        ("I was hardly impressed with the battery", 0),
        ("my phone never disappoints", 1),
        ("there is nothing about the desk that I like", 0),
        ("nobody at home is angry with this oven", 1),
        ("neither the lid nor the handle is elegant", 0),
        ("the screen looks anything but ugly", 1),
        ("the lid is awkward, but the kettle is very robust", 1),
        ("I adore the screen, but my phone is not reliable", 0),
        ("I dislike the lid. However, the kettle works well", 1),
        ("although I enjoy the sound, this radio is a nuisance", 0),
        ("the radio is certainly a gem, even though I dislike the sound", 1),
        ("despite the clumsy handle, I love my kettle", 1),
        ("I regret this drill despite the sturdy grip", 0),
        ("the kettle is much better than the old one", 1),
        ("my camera is slightly worse than my last one", 0),
        ("the old one is much worse than this one", 1),
        ("the old one is even less noisy than this kettle", 0),
        ("I would rather have the old one than this kettle", 0),
        ("I would rather have this kettle than the old one", 1),
        ("I have never had a more elegant kettle", 1),
        ("this sofa could not be worse", 0),
        ("never was I disappointed with the screen", 1),
        ("far from elegant, the lamp looks crude", 0),
        ("in spite of the brittle case, I treasure this radio", 1),
    ],
)
def test_opinions_mean_what_a_reader_takes_them_to_mean(opinion, label):
    assert readings(opinion) == {label}


def test_what_it_makes_is_read_as_labelled():
    """Bare opinions: one sentence that nothing was added to or contracted in."""
    bare = 0
    for review in Reviews(**SMALL).reviews["train"][:150]:
        opinion = review.text[:1].lower() + review.text[1:-1]
        opinion = re.sub(r"^i\b", "I", re.sub(r"\ban\b", "a", opinion))
        if found := readings(opinion):
            bare += 1
            assert found == {review.label}, review
    assert bare > 10


def test_each_family_of_the_grammar_is_in_each_known_group(corpus):
    for group in ("sentences", "words"):
        used = {template for review in in_group(corpus, group) for template in review.templates}
        for family in (PLAIN, NEGATION, COMPARISON, CONTRAST):
            assert used & set(family)
    assert set(KNOWN) == {*PLAIN, *NEGATION, *COMPARISON, *CONTRAST}


def digest(corpus):
    rows = [(split, *row.values()) for split in corpus.splits for row in corpus.rows(split)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def test_another_process_makes_the_same(small):
    code = "import sys; sys.path.insert(0, 'tests/corpus'); from test_corpus_reviews import *; c = Reviews(**SMALL); "
    code += "print(c.fingerprint(), digest(c))"
    expected = [small.fingerprint(), DIGEST]
    assert digest(small) == digest(Reviews(**SMALL)) == DIGEST
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        made = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        assert made.stdout.split() == expected


def test_the_fingerprint_is_of_the_sizes(small):
    prints = {Reviews(**{**SMALL, name: 3000}).fingerprint() for name in SMALL}
    assert len(prints | {small.fingerprint()}) == 4
    assert Reviews(**SMALL).fingerprint() == small.fingerprint()


@pytest.mark.parametrize(
    ("name", "value"),
    [("examples", 1999), ("examples", 100_001), ("validation", 0), ("test", 10_001), ("test", 1.5), ("test", True)],
)
def test_sizes_out_of_range_are_the_users_mistake(name, value):
    with pytest.raises(
        UserError, match=rf"corpus\.{name}={value}; expected a whole number from .*data\.corpus\.{name}="
    ):
        Reviews(**{name: value})


def test_an_unknown_split_is_named(small):
    with pytest.raises(UserError, match="no dev split; it has train, validation, test"):
        small.rows("dev")
