"""How near summaries come to references: ROUGE as papers count it, how much of them is new, and the lead baseline."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SCORES = (
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "novel_unigrams", "novel_bigrams", "novel_trigrams"),
    *("exact_match", "length_ratio", "lead_rougeL"),
)
"""What `scores` gives."""

_SENTENCE_END = re.compile(r"(?<!\.\w)[.!?][\"'`)\]]*(?=\s|$)|\n\s*\n")


def rouge(outputs: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """`rouge1`, `rouge2`, `rougeL` and `rougeLsum` of each pair: F-measures (Lin 2004), 0 to 100, by the package
    `rouge-score`.

    Words are Porter-stemmed, as papers do. A text is one sentence for `rougeL`; `rougeLsum` is the summary-level
    ROUGE-L (Lin 2004, section 3.2), which papers report of summaries of several sentences: they end as `lead` says. The
    tokenizer knows a to z and 0 to 9 only, after lower-casing: any other letter ends a word and is dropped, so that
    `Grüße` is `gr e`, and a text without such letters scores 0, even beside itself.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, because it imports nltk and absl

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [
        scorer.score("\n".join(sentences(reference)), "\n".join(sentences(output)))  # a line is a sentence there
        for output, reference in zip(outputs, references, strict=True)
    ]
    return {kind: [100 * float(scored[kind].fmeasure) for scored in found] for kind in kinds}


def novel_ngrams(outputs: Sequence[str], sources: Sequence[str], n: int) -> list[tuple[int, int]]:
    """How many of the distinct runs of `n` words of each output its source does not have, and how many there are (See
    et al. 2017, section 7.2). Words are runs of letters and digits in lower case."""
    found = []
    for output, source in zip(outputs, sources, strict=True):
        written = _ngrams(output, n)
        found.append((len(written - _ngrams(source, n)), len(written)))
    return found


def sentences(text: str) -> list[str]:
    """The sentences of a text, each as it stands; see `lead`."""
    begin, found = 0, []
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        if sentence := " ".join(text[begin:end].split()):
            found.append(sentence)
        begin = end
    return found


def lead(source: str, n_words: int) -> str:
    """The first sentence, of it the first `n_words` words.

    A sentence ends with `.`, `!` or `?` and what closes quotes or brackets, if a blank or nothing follows and it does
    not abbreviate as in `e.g.`; an empty line ends it, too.
    """
    text = source.strip()
    end = _SENTENCE_END.search(text)
    return " ".join(text[: end.end() if end else None].split()[: max(0, n_words)])


def bootstrap(values: Sequence[float], resamples: int, seed: int = 0) -> float:
    """Half the width of the 95 % interval of the mean, between percentiles of the means of `resamples` samples drawn
    with replacement (Efron 1979). The same for the same values, resamples and seed."""
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    return half_width(lambda rows: float(sample[rows].mean()), len(sample), resamples, seed)


def half_width(statistic: Callable[[np.ndarray], float], n: int, resamples: int, seed: int = 0) -> float:
    """The same for any number that is made of n examples, given which of them were drawn."""
    import numpy as np

    assert n > 0
    assert resamples > 0
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(high - low) / 2


def ratio(pairs: Sequence[tuple[float, float]], name: str, resamples: int) -> dict[str, float]:
    """Under `name` the sum of the first numbers to that of the second, of all examples together, and with `resamples`
    of them under `<name>_ci` half the width of its interval."""
    import numpy as np

    counts = np.asarray(pairs, dtype=np.float64)

    def of(rows: np.ndarray) -> float:
        above, below = counts[rows].sum(0)
        return float(above / max(1, below))

    result = {name: of(np.arange(len(counts)))}
    return result | ({f"{name}_ci": half_width(of, len(counts), resamples)} if resamples else {})


def mean(values: Sequence[float], name: str, resamples: int) -> dict[str, float]:
    """Under `name` the mean, and with `resamples` its interval as in `ratio`."""
    return {name: fmean(values)} | ({f"{name}_ci": bootstrap(values, resamples)} if resamples else {})


def lengths(outputs: Sequence[str], references: Sequence[str]) -> list[tuple[int, int]]:
    """Words of each output and of its reference."""
    return [(len(o.split()), len(r.split())) for o, r in zip(outputs, references, strict=True)]


def scores(
    outputs: Sequence[str], references: Sequence[str], sources: Sequence[str], bootstrap: int = 0
) -> dict[str, float]:
    """Of summaries: means of `rouge`; `novel_unigrams` and so on, the share of such runs of words of the outputs that
    their sources do not have; `exact_match`, the share of outputs that are their reference; `length_ratio`, words of
    outputs to words of references; and `lead_rougeL`, ROUGE-L of the lead of each source, cut to as many words as
    references have on average.

    With `bootstrap` resamples of the pairs also `rouge1_ci` and so on, half the widths of their 95 % intervals. Nothing
    for no pairs.
    """
    assert len(outputs) == len(references) == len(sources)
    if not outputs:
        return {}
    result: dict[str, float] = {}
    for kind, values in rouge(outputs, references).items():
        result |= mean(values, kind, bootstrap)
    for n, runs in enumerate(("unigrams", "bigrams", "trigrams"), 1):
        result |= ratio(novel_ngrams(outputs, sources, n), f"novel_{runs}", bootstrap)
    result |= mean([float(o == r) for o, r in zip(outputs, references, strict=True)], "exact_match", bootstrap)
    words = lengths(outputs, references)
    result |= ratio(words, "length_ratio", bootstrap)
    leads = [lead(source, round(fmean(of_reference for _, of_reference in words))) for source in sources]
    return result | mean(rouge(leads, references)["rougeL"], "lead_rougeL", bootstrap)


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
