"""How near summaries come to references: ROUGE as papers count it, how much of them is new, and the lead baseline."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SCORES = ("rouge1", "rouge2", "rougeL", "novel_bigrams", "exact_match", "length_ratio", "lead_rougeL")
"""What `scores` gives."""

_SENTENCE_END = re.compile(r"(?<!\.\w)[.!?][\"'`)\]]*(?=\s|$)|\n\s*\n")


def rouge(outputs: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """`rouge1`, `rouge2` and `rougeL` of each pair: F-measures (Lin 2004), 0 to 100, by the package `rouge-score`.

    Words are Porter-stemmed, as papers do, and a text is one sentence for ROUGE-L: of summaries of several
    sentences papers often report the summary-level ROUGE-L instead (rouge-score's rougeLsum), which is higher. Its
    tokenizer knows a to z and 0 to 9 only, after lower-casing: any other letter ends a word and is dropped, so that
    `Grüße` is `gr e`, and a text without such letters scores 0, even beside itself.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, because it imports nltk and absl

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
    return {kind: [100 * float(scored[kind].fmeasure) for scored in found] for kind in kinds}


def novel_ngrams(outputs: Sequence[str], sources: Sequence[str], n: int) -> float:
    """Share of the distinct runs of `n` words of each output that its source does not have, over all outputs together
    (See et al. 2017, section 7.2); 0 if there are none. Words are runs of letters and digits in lower case."""
    novel = total = 0
    for output, source in zip(outputs, sources, strict=True):
        written = _ngrams(output, n)
        novel += len(written - _ngrams(source, n))
        total += len(written)
    return novel / max(1, total)


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


_mean_interval = bootstrap  # `scores` has an argument of that name


def scores(
    outputs: Sequence[str], references: Sequence[str], sources: Sequence[str], bootstrap: int = 0
) -> dict[str, float]:
    """Of summaries: means of `rouge`; `novel_bigrams`; `exact_match`, the share of outputs that are their reference;
    `length_ratio`, words of outputs to words of references; and `lead_rougeL`, ROUGE-L of the lead of each source, cut
    to as many words as references have on average.

    With `bootstrap` resamples of the pairs also `rouge1_ci`, `rouge2_ci` and `rougeL_ci`, half the widths of their 95 %
    intervals. Nothing for no pairs.
    """
    assert len(outputs) == len(references) == len(sources)
    if not outputs:
        return {}
    found = rouge(outputs, references)
    result = {}
    for kind, values in found.items():
        result[kind] = fmean(values)
        if bootstrap:
            result[f"{kind}_ci"] = _mean_interval(values, bootstrap)
    result["novel_bigrams"] = novel_ngrams(outputs, sources, 2)
    result["exact_match"] = fmean(o == r for o, r in zip(outputs, references, strict=True))
    words = sum(len(reference.split()) for reference in references)
    result["length_ratio"] = sum(len(output.split()) for output in outputs) / max(1, words)
    leads = [lead(source, round(words / len(references))) for source in sources]
    result["lead_rougeL"] = fmean(rouge(leads, references)["rougeL"])
    return result


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
