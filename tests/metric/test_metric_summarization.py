"""Scores of summaries: against rouge-score itself, brute force, counts by hand, and at the edges."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import combinations
from statistics import fmean, stdev

import pytest

from lmexp.metric.summarization import SCORES, bootstrap, lead, novel_ngrams, ratio, rouge, scores, sentences

WORDS = ["run", "running", "runs", "quickly", "the", "cats", "cat", "of", "12", "jump"]
SHORT = ["a", "be", "cow", "dot"]
"""Words of at most 3 letters, which are not stemmed."""


def texts(words: list[str], count: int, longest: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(0, longest))) for _ in range(count)]


def longest_common(a: list[str], b: list[str]) -> int:
    """By trying all subsequences of `a`."""

    def within(part: tuple[str, ...]) -> bool:
        rest = iter(b)
        return all(word in rest for word in part)

    return max(size for size in range(len(a) + 1) for part in combinations(a, size) if within(part))


def f_measure(common: int, output: int, reference: int) -> float:
    return 200 * common / (output + reference) if common else 0.0


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    outputs = [*texts(WORDS, 50, 12, 0), "", "same", "", "Grüße aus Köln", "A-b; c!"]
    references = [*texts(WORDS, 50, 12, 1), "", "same", "other", "Grüße aus Bonn", "a b c"]
    found = rouge(outputs, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for place, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        for kind, score in scorer.score(reference, output).items():
            assert found[kind][place] == pytest.approx(100 * score.fmeasure)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_rouge_of_sentences_is_that_of_rouge_score() -> None:
    """Texts whose sentences are known stand on lines for rouge-score, beside one another for ours."""
    from rouge_score.rouge_scorer import RougeScorer

    draw = random.Random(4)
    scorer = RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)
    higher = 0
    for _ in range(60):
        sides = [
            [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + draw.choice([".", "!", '?"']) for _ in range(n)]
            for n in (draw.randint(0, 4), draw.randint(1, 4))
        ]
        output, reference = (draw.choice([" ", "\n", "\n\n"]).join(side) for side in sides)
        assert [sentences(output), sentences(reference)] == sides
        expected = scorer.score("\n".join(sides[1]), "\n".join(sides[0]))
        found = rouge([output], [reference])
        for kind, score in expected.items():
            assert found[kind] == [pytest.approx(100 * score.fmeasure)]
        higher += found["rougeLsum"][0] > found["rougeL"][0]
    assert higher > 10


def test_rouge_by_brute_force() -> None:
    outputs, references = texts(SHORT, 60, 8, 2), texts(SHORT, 60, 8, 3)
    found = rouge(outputs, references)
    for place, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        a, b = output.split(), reference.split()
        assert found["rougeL"][place] == pytest.approx(f_measure(longest_common(a, b), len(a), len(b)))
        common = sum(min(a.count(word), b.count(word)) for word in set(a))
        assert found["rouge1"][place] == pytest.approx(f_measure(common, len(a), len(b)))


def test_rouge_stems_and_drops_what_is_not_ascii() -> None:
    assert rouge(["cats running"], ["cat runs"])["rouge2"] == [pytest.approx(100)]
    assert rouge(["Straße"], ["Stra e"])["rouge1"] == [pytest.approx(100)], "ß ends a word"
    assert rouge(["日本語のテスト"], ["日本語のテスト"])["rougeL"] == [0], "nothing is left to compare"
    assert rouge([], []) == {"rouge1": [], "rouge2": [], "rougeL": [], "rougeLsum": []}
    with pytest.raises(ValueError, match="zip"):
        rouge(["a"], [])


def novel(outputs: list[str], sources: list[str], n: int) -> float:
    return ratio(novel_ngrams(outputs, sources, n), "share", 0)["share"]


def test_novel_ngrams_by_hand() -> None:
    source = "The cat sat on the mat. It slept."
    assert novel(["the cat sat"], [source], 2) == 0
    assert novel(["A cat sat, on a mat"], [source], 1) == pytest.approx(1 / 5), "a, of a cat sat on mat"
    assert novel(["A cat sat, on a mat"], [source], 2) == pytest.approx(3 / 5), "a cat, on a, a mat"
    assert novel(["no no no no"], [source], 2) == 1, "no no, once"
    # 1 of 2 and 0 of 1: counts add up, shares do not
    assert novel(["the cat ran", "it slept"], [source, source], 2) == pytest.approx(1 / 3)
    assert novel(["cat", ""], [source, source], 2) == 0, "too short to have any"
    assert novel(["die Grüße"], ["die grüße aus Köln"], 2) == 0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("One two three. Four.", "One two three."),
        ("One two three four five six seven. Eight.", "One two three four five"),
        ("No end here", "No end here"),
        ("Version 3.2 of it! More.", "Version 3.2 of it!"),
        ("He said (e.g. this one). More.", "He said (e.g. this one)."),
        ('"Is it?" she said.', '"Is it?"'),
        ("A heading\n\nThen text.", "A heading"),
        ("\n  Wrapped\n  lines. More.", "Wrapped lines."),
        ("", ""),
    ],
)
def test_the_lead_is_the_first_sentence(source: str, expected: str) -> None:
    assert lead(source, 5) == expected


def test_the_lead_is_cut() -> None:
    assert lead("One two.", 0) == ""
    assert lead("One two.", 1) == "One"


def test_the_interval_is_that_of_the_mean() -> None:
    draw = random.Random(0)
    values = [draw.gauss(40, 10) for _ in range(400)]
    assert bootstrap(values, 2000) == pytest.approx(1.96 * stdev(values) / 400**0.5, rel=0.06)
    assert bootstrap(values, 50) == bootstrap(values, 50)
    assert bootstrap(values, 50) != bootstrap(values, 50, seed=1)
    assert bootstrap([7.0] * 9, 20) == 0


def test_scores_of_all_pairs() -> None:
    sources = ["The cat sat on the mat. It slept.", "Dogs bark at night, a lot. Cats do not."]
    references = ["the cat sat down", "dogs bark"]
    outputs = ["the cat slept", "dogs bark"]
    found = scores(outputs, references, sources)
    assert sorted(found) == sorted(SCORES)
    for kind, values in rouge(outputs, references).items():
        assert found[kind] == pytest.approx(fmean(values))
    assert found["novel_bigrams"] == pytest.approx(1 / 3)
    assert found["exact_match"] == 0.5
    assert found["length_ratio"] == pytest.approx(5 / 6)
    # 3 words each: 'The cat sat' and 'Dogs bark at'
    assert found["lead_rougeL"] == pytest.approx((f_measure(3, 3, 4) + f_measure(2, 3, 2)) / 2)
    again = scores(outputs, references, sources, bootstrap=100)
    assert {name: again[name] for name in SCORES} == found
    assert set(again) - set(found) == {f"{name}_ci" for name in SCORES}
    assert again["rougeL_ci"] == bootstrap(rouge(outputs, references)["rougeL"], 100) > 0


def test_the_interval_of_a_ratio_is_that_of_its_spread() -> None:
    """Against the delta method: the variance of a ratio of means."""
    draw = random.Random(1)
    pairs = [(b * draw.uniform(0.6, 1.4), float(b)) for b in (draw.randint(5, 30) for _ in range(400))]
    found = ratio(pairs, "r", 2000)
    value = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    assert found["r"] == pytest.approx(value)
    spread = stdev(a - value * b for a, b in pairs) / fmean(b for _, b in pairs) / 400**0.5
    assert found["r_ci"] == pytest.approx(1.96 * spread, rel=0.06)


def test_edges() -> None:
    assert scores([], [], []) == {}
    same = ["one two three", "four five six"]
    found = scores(same, same, same)
    assert (found["rougeL"], found["novel_bigrams"], found["exact_match"], found["length_ratio"]) == (100, 0, 1, 1)
    assert found["lead_rougeL"] == 100
    nothing = scores(["", ""], same, same, bootstrap=10)
    assert (nothing["rouge1"], nothing["rougeL_ci"], nothing["exact_match"], nothing["length_ratio"]) == (0, 0, 0, 0)
    assert scores(["a"], [""], [""])["lead_rougeL"] == 0


def test_it_imports_neither_torch_nor_nltk() -> None:
    code = "import sys, lmexp.metric.summarization; print({'torch', 'numpy', 'nltk', 'absl'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
