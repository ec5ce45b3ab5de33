"""Scores of outputs: against BLEU by hand, and at the edges."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from lmexp.metric.text_to_text import SCORES, scores, sentence_chrf, signatures

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


def test_chrf_and_ter_are_sacrebleus() -> None:
    import sacrebleu

    for outputs, references in ((OUTPUTS, REFERENCES), (["", "日本語"], ["Grüße", "日本"]), (["a b c"], ["c b a d"])):
        found = scores(outputs, references, bootstrap=10)
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, [references]).score)
        assert found["ter"] == pytest.approx(sacrebleu.corpus_ter(outputs, [references]).score)
        assert {"chrf_ci", "ter_ci", "exact_match_ci"} <= found.keys()
