"""Ratios of sums: the split into batches does not matter, and the formulas are those of the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from lmexp.metric.language_modeling import LanguageModeling

BATCHES = [(12.5, 5, 17.0), (0.0, 0, 0.0), (3.25, 2, 9.0), (100.0, 31, 80.0)]


def filled(batches: list[tuple[float, int, float]]) -> LanguageModeling:
    metric = LanguageModeling()
    for nats, tokens, n_bytes in batches:
        metric.update(torch.tensor(nats), torch.tensor(tokens), torch.tensor(n_bytes))
    return metric


def test_definitions() -> None:
    nats, tokens, n_bytes = (sum(column) for column in zip(*BATCHES, strict=True))
    values = filled(BATCHES).compute()
    assert values["loss"] == pytest.approx(nats / tokens)
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes)
    assert set(values) == set(LanguageModeling().names)


def test_the_split_does_not_matter() -> None:
    whole = tuple(sum(column) for column in zip(*BATCHES, strict=True))
    assert filled([whole]).compute() == pytest.approx(filled(BATCHES).compute())  # type: ignore[list-item]


def test_nothing_scored_and_no_bytes() -> None:
    assert filled([]).compute() == {}
    assert set(filled([(1.0, 2, 0.0)]).compute()) == {"loss", "perplexity"}
    assert filled([(7000.0, 2, 0.0)]).compute()["perplexity"] == math.inf
