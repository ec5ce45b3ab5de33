"""Pooling against loops, and the head against BERT's classifier of Transformers."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from lmexp.model.classifier import POOLINGS, ClassifierHead, pool

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, -1], [0, 1, 1, 1, 1, -1, -1], [-1] * 7])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_that_of_a_loop(pooling: str) -> None:
    hidden = torch.randn(3, 7, 5, dtype=torch.float64)
    got = pool(hidden, DOCUMENTS, 3, pooling)  # type: ignore[arg-type]
    assert torch.isfinite(got).all()
    for r, row in enumerate(DOCUMENTS.tolist()):
        for number in range(3):
            places = [t for t, document in enumerate(row) if document == number]
            if not places:
                continue
            own = hidden[r, places]
            expected = {"first": own[0], "last": own[-1], "mean": own.mean(0)}[pooling]
            torch.testing.assert_close(got[r, number], expected)


def test_the_head_is_roberta_classifiers() -> None:
    config = hf.RobertaConfig(hidden_size=12, num_labels=3, hidden_dropout_prob=0.0)
    theirs = hf.models.roberta.modeling_roberta.RobertaClassificationHead(config).eval()
    ours = ClassifierHead(12, ("a", "b", "c"), hidden=True, dropout=0.0)
    assert ours.hidden is not None
    ours.hidden.load_state_dict(theirs.dense.state_dict())
    ours.output.load_state_dict(theirs.out_proj.state_dict())
    hidden = torch.randn(4, 6, 12)
    torch.testing.assert_close(ours(hidden[:, 0]), theirs(hidden))


@pytest.mark.parametrize(("first", "differs"), [(0.0, False), (None, True)])
def test_dropout_before_the_first_layer(first: float | None, differs: bool) -> None:
    head = ClassifierHead(8, ("a", "b"), hidden=True, dropout=0.5, input_dropout=first)
    assert head.hidden is not None
    seen: list[torch.Tensor] = []
    head.hidden.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    x = torch.ones(4, 8)
    head(x)
    assert bool((seen[0] != x).any()) == differs
    head.eval()
    head(x)
    torch.testing.assert_close(seen[1], x)
