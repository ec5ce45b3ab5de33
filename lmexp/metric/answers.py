"""How right answers are: exact match and F1 as SQuAD has them, means with their intervals."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple


class Score(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Score:
    """The mean of numbers in [0, 1] and Wilson's (1927) interval for it.

    For other numbers than 0 and 1 it is too wide rather than too narrow: their variance is at most p (1 - p).
    """
    n, p = len(values), fmean(values)
    z = NormalDist().inv_cdf(0.975)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    return Score(p, max(0.0, center - half), min(1.0, center + half))


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces: as SQuAD's official evaluation."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words that the two have in common; if one of them has no words: 1
    if both have none, else 0 (SQuAD 2.0's evaluation)."""
    given, right = normalized(text).split(), normalized(answer).split()
    if not given or not right:
        return float(given == right)
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right))
