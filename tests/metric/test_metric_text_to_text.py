"""Scores of outputs: against BLEU by hand, and at the edges."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.contracts import UserError
from lmexp.metric.text_to_text import SCORES, check_tokenizer, scores, sentence_chrf, signatures

OUTPUTS = ["the cat sat on the mat", "a dog ran to it", "yes"]
REFERENCES = ["the cat sat on a mat today", "a dog ran to it", "no"]


def bleu(outputs: list[str], references: list[str]) -> float:
    """Papineni et al. 2002, eq. of section 2.3, of words, without smoothing."""
    log = 0.0
    for n in range(1, 5):
        found = total = 0
        for output, reference in zip(outputs, references, strict=True):
            a, b = (Counter(zip(*(t.split()[i:] for i in range(n)), strict=False)) for t in (output, reference))
            found += sum((a & b).values())
            total += sum(a.values())
        log += math.log(found / total) / 4
    c, r = (sum(len(t.split()) for t in texts) for texts in (outputs, references))
    return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(log)


def test_bleu_is_that_of_the_paper() -> None:
    found = scores(OUTPUTS, REFERENCES)
    assert tuple(found) == SCORES
    assert found["bleu"] == pytest.approx(bleu(OUTPUTS, REFERENCES), rel=1e-9)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["length_ratio"] == pytest.approx(12 / 13)


def test_edges() -> None:
    assert scores([], []) == {}
    same = ["Grüße aus Köln", "日本語 のテスト です ね"]
    found = scores(same, same)
    assert (found["chrf"], found["exact_match"], found["length_ratio"]) == (pytest.approx(100), 1, 1)
    nothing = scores(["", ""], same)
    assert (nothing["bleu"], nothing["chrf"], nothing["exact_match"]) == (0, 0, 0)
    assert sentence_chrf("a b", "a b") == pytest.approx(100)
    assert signatures().startswith("BLEU|nrefs:1|")


def test_the_interval_narrows_with_more_pairs() -> None:
    few, many = (scores(OUTPUTS * n, REFERENCES * n, bootstrap=200)["bleu_ci"] for n in (5, 80))
    assert 0 < many < few


WORDS = ["the", "cat", "cats", "Grüße", "日本語", "a.b", "it's", "-", "&quot;", "\u2028"]
WORD = st.one_of(st.sampled_from(WORDS), st.text())
TEXT = st.lists(WORD, max_size=12).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), st.booleans())
def test_bleu_chrf_and_ter_are_sacrebleus(pairs: list[tuple[str, str]], same: bool) -> None:
    import sacrebleu

    outputs, references = ([pair[side] for pair in pairs] for side in (0, 0 if same else 1))
    found = scores(outputs, references)
    for name, corpus_score in (
        ("bleu", sacrebleu.corpus_bleu),
        ("chrf", sacrebleu.corpus_chrf),
        ("ter", sacrebleu.corpus_ter),
    ):
        assert found[name] == pytest.approx(corpus_score(outputs, [references]).score, rel=1e-9), name


def test_tokenizers_of_bleu_are_sacrebleus() -> None:
    import sacrebleu

    outputs, references = ["日本語のテストです。", "猫が好き"], ["日本語の試験です。", "犬が好きだ"]
    for tokenize in ("13a", "zh", "char"):
        expected = sacrebleu.corpus_bleu(outputs, [references], tokenize=tokenize).score
        assert scores(outputs, references, tokenize=tokenize)["bleu"] == pytest.approx(expected)
    assert "|tok:char|" in signatures("char")
    with pytest.raises(UserError, match=r"callback.answers.tokenize=13b; expected 13a, char"):
        check_tokenizer("13b")


def test_intervals_are_those_of_resampled_pairs() -> None:
    """Half the range of the middle 95 % of 2000 resamplings, made here by other draws."""
    import sacrebleu

    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "bark"]
    references = [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(60)]
    outputs = [" ".join(w if draw.random() < 0.8 else draw.choice(words) for w in r.split()) for r in references]
    found = scores(outputs, references, bootstrap=1000)
    for name, corpus_score, resamples in (
        ("bleu", sacrebleu.corpus_bleu, 1000),
        ("chrf", sacrebleu.corpus_chrf, 400),
        ("ter", sacrebleu.corpus_ter, 150),
    ):
        drawn = []
        for _ in range(resamples):
            rows = draw.choices(range(60), k=60)
            drawn.append(corpus_score([outputs[i] for i in rows], [[references[i] for i in rows]]).score)
        drawn.sort()
        half = (drawn[int(0.975 * resamples)] - drawn[int(0.025 * resamples)]) / 2
        assert found[f"{name}_ci"] == pytest.approx(half, rel=0.25 if name == "ter" else 0.15), name
    assert {"exact_match_ci", "length_ratio_ci"} <= found.keys()
