"""How near outputs come to references: BLEU and chrF as sacrebleu counts them, and plain counts."""

from __future__ import annotations

from collections.abc import Sequence

SCORES = ("bleu", "chrf", "exact_match", "length_ratio")
"""What `scores` gives."""


def scores(outputs: Sequence[str], references: Sequence[str], bootstrap: int = 0) -> dict[str, float]:
    """Over all pairs together: `bleu` (Papineni et al. 2002) and `chrf` (Popovic 2015), 0 to 100, with sacrebleu's
    default settings (Post 2018), `exact_match`, the share of outputs that are their reference, and `length_ratio`,
    words of outputs to words of references.

    With `bootstrap` resamples of the pairs also `bleu_ci`, half the width of its 95 % confidence interval (Koehn 2004).
    """
    from sacrebleu.metrics import BLEU, CHRF

    assert len(outputs) == len(references)
    if not outputs:
        return {}
    result = {}
    bleu = BLEU().corpus_score(list(outputs), [list(references)], n_bootstrap=bootstrap or 1)
    result["bleu"] = float(bleu.score)
    if bootstrap:
        result["bleu_ci"] = float(bleu._ci)
    result["chrf"] = float(CHRF().corpus_score(list(outputs), [list(references)]).score)
    result["exact_match"] = sum(o == r for o, r in zip(outputs, references, strict=True)) / len(outputs)
    words = sum(len(reference.split()) for reference in references)
    result["length_ratio"] = sum(len(output.split()) for output in outputs) / max(1, words)
    return result


def sentence_chrf(output: str, reference: str) -> float:
    """chrF of one output, 0 to 100."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().sentence_score(output, [reference]).score)


def signatures() -> str:
    """What sacrebleu says of how it counts, for papers."""
    from sacrebleu.metrics import BLEU, CHRF

    found = []
    for metric in (BLEU(), CHRF()):
        metric.corpus_score(["a"], [["a"]], n_bootstrap=1)
        found.append(f"{type(metric).__name__}|{metric.get_signature()}")
    return ", ".join(found)
