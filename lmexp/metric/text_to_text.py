"""How near outputs come to references: BLEU, chrF and TER as sacrebleu counts them, and plain counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from lmexp.contracts import UserError
from lmexp.metric.summarization import half_width, lengths, mean, ratio

SCORES = ("bleu", "chrf", "ter", "exact_match", "length_ratio")
"""What `scores` gives."""


def scores(
    outputs: Sequence[str], references: Sequence[str], bootstrap: int = 0, tokenize: str = "13a"
) -> dict[str, float]:
    """Over all pairs together: `bleu` (Papineni et al. 2002) and `chrf` (Popovic 2015), 0 to 100, and `ter` (Snover et
    al. 2006), edits for 100 words, lower is better, with sacrebleu's default settings (Post 2018), but for BLEU's
    tokenizer, which is `tokenize`; `exact_match`, the share of outputs that are their reference, and `length_ratio`,
    words of outputs to words of references.

    With `bootstrap` resamples of the pairs also `bleu_ci` and so on, half the widths of their 95 % intervals (Koehn
    2004).
    """
    from sacrebleu.metrics import BLEU, CHRF, TER

    assert len(outputs) == len(references)
    if not outputs:
        return {}
    result = {}
    bleu = BLEU(tokenize=tokenize).corpus_score(list(outputs), [list(references)], n_bootstrap=bootstrap or 1)
    result["bleu"] = float(bleu.score)
    if bootstrap:
        result["bleu_ci"] = float(bleu._ci)
    for name, metric in (("chrf", CHRF()), ("ter", TER())):
        # sacrebleu's own resampling fails for counts that are not all whole (release 2.6)
        counts = np.array(metric._extract_corpus_statistics(list(outputs), [list(references)]), dtype=np.float64)
        result[name] = float(metric._compute_score_from_stats(counts.sum(0).tolist()).score)
        if bootstrap:
            result[f"{name}_ci"] = half_width(partial(_of_drawn, metric, counts), len(counts), bootstrap)
    result |= mean([float(o == r) for o, r in zip(outputs, references, strict=True)], "exact_match", bootstrap)
    return result | ratio(lengths(outputs, references), "length_ratio", bootstrap)


def _of_drawn(metric: Any, counts: np.ndarray, rows: np.ndarray) -> float:
    return float(metric._compute_score_from_stats(counts[rows].sum(0).tolist()).score)


def sentence_chrf(output: str, reference: str) -> float:
    """chrF of one output, 0 to 100."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().sentence_score(output, [reference]).score)


def check_tokenizer(tokenize: str) -> None:
    """Raise `UserError` unless sacrebleu has such a tokenizer, and what it needs."""
    from sacrebleu.metrics import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"callback.answers.tokenize={tokenize}; expected {', '.join(sorted(BLEU.TOKENIZERS))}.")
    try:
        BLEU(tokenize=tokenize)
    except Exception as error:  # RuntimeError or ImportError of what the tokenizer is made of, or a download
        reason = " ".join(str(error).split())
        raise UserError(
            f"callback.answers.tokenize={tokenize} cannot be used: {reason} Install what it needs (for ja-mecab: pip "
            "install 'sacrebleu[ja]', for ko-mecab: 'sacrebleu[ko]'), or choose another, such as char."
        ) from error


def signatures(tokenize: str = "13a") -> str:
    """What sacrebleu says of how it counts, for papers."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    found = []
    for metric in (BLEU(tokenize=tokenize), CHRF(), TER()):
        metric.corpus_score(["a"], [["a"]], n_bootstrap=1)
        found.append(f"{type(metric).__name__}|{metric.get_signature()}")
    return ", ".join(found)
