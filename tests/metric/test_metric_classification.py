"""Scores of labels against scikit-learn's, and intervals against what they mean."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from lmexp.contracts import IGNORE_INDEX, UserError
from lmexp.metric.classification import N_BINS, ClassificationScores

RANDOM = np.random.default_rng(3)


def scores(logits: torch.Tensor, labels: torch.Tensor, classes: int, pieces: int = 1, **options) -> dict[str, float]:
    multilabel = labels.dim() == 2
    metric = ClassificationScores(bootstrap=20)
    metric.bind([f"c{i}" for i in range(classes)], multilabel, options.get("names", ()))
    groups = options.get("groups", torch.zeros(len(labels), dtype=torch.int64))
    for rows in torch.arange(len(labels)).chunk(pieces):
        metric.update(logits[rows], labels[rows], rows, groups[rows])
    return metric.compute()


@pytest.mark.parametrize(("n", "classes"), [(200, 2), (200, 5), (30, 3), (7, 2)])
def test_one_label_scores_equal_scikit_learns(n: int, classes: int) -> None:
    labels = torch.from_numpy(np.concatenate([np.arange(classes), RANDOM.integers(classes, size=n - classes)]))
    logits = torch.from_numpy(RANDOM.normal(size=(n, classes))).float()
    logits[torch.arange(n), labels] += 0.7
    got = scores(logits, labels, classes, pieces=3)
    probabilities = logits.softmax(-1).numpy()
    told, y = probabilities.argmax(1), labels.numpy()
    assert got["loss"] == pytest.approx(sk.log_loss(y, probabilities.astype(np.float64)), rel=1e-5)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, told))
    assert got["f1"] == pytest.approx(sk.f1_score(y, told, average="macro"), rel=1e-6)
    each = sk.f1_score(y, told, average=None, labels=range(classes), zero_division=0)
    assert [got[f"f1/c{i}"] for i in range(classes)] == pytest.approx(each, rel=1e-6)
    assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(y, told), abs=1e-6)
    expected = np.mean([sk.roc_auc_score(y == c, probabilities[:, c]) for c in range(classes)])
    assert got["auroc"] == pytest.approx(expected, rel=1e-5)
    assert got["ece"] == pytest.approx(ece(probabilities.max(1), told == y), abs=1e-6)


def ece(sure: np.ndarray, right: np.ndarray) -> float:
    """Guo et al. 2017, equation 3."""
    bins = np.minimum((sure * N_BINS).astype(int), N_BINS - 1)
    return sum(abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in set(bins))


def test_several_labels_score_as_scikit_learns() -> None:
    n, classes = 120, 4
    labels = torch.from_numpy(RANDOM.integers(2, size=(n, classes)))
    logits = torch.from_numpy(RANDOM.normal(size=(n, classes))).float() + labels
    got = scores(logits, labels, classes, pieces=4)
    probabilities = logits.sigmoid().numpy()
    told, y = (probabilities >= 0.5).astype(int), labels.numpy()
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, told))
    assert got["f1"] == pytest.approx(sk.f1_score(y, told, average="macro"), rel=1e-6)
    assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(y.ravel(), told.ravel()), abs=1e-6)
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(y, probabilities, average="macro"), rel=1e-5)
    assert got["ece"] == pytest.approx(ece(probabilities.ravel(), y.ravel()), abs=1e-6)
    p = probabilities.astype(np.float64)
    assert got["loss"] == pytest.approx(-np.mean(np.where(y == 1, np.log(p), np.log(1 - p))), rel=1e-5)


@pytest.mark.parametrize(
    ("y", "told"), [([0, 0, 0], [0, 0, 0]), ([0, 0, 1], [1, 1, 0]), ([2, 2], [0, 0]), ([1], [1]), ([0, 1], [0, 1])]
)
def test_edges_are_as_scikit_learns(y: list[int], told: list[int]) -> None:
    logits = torch.nn.functional.one_hot(torch.tensor(told), 3).float() * 4
    got = scores(logits, torch.tensor(y), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert got["f1"] == pytest.approx(sk.f1_score(y, told, average="macro", zero_division=0))
        assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(y, told))
    assert got["accuracy"] == sk.accuracy_score(y, told)
    if len(set(y)) == 1:
        assert "auroc" not in got, "one class alone has no curve"


def test_no_examples_have_no_scores() -> None:
    metric = ClassificationScores(bootstrap=0)
    metric.bind(("a", "b"), False, ())
    nothing = torch.full((2,), IGNORE_INDEX)
    metric.update(torch.zeros(2, 2), nothing, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert metric.compute() == {}


def test_groups_padding_and_order() -> None:
    labels = torch.tensor([0, 1, 0, 1, IGNORE_INDEX])
    logits = torch.tensor([[3.0, 0], [3, 0], [3, 0], [0, 3], [9, 9]])
    metric = ClassificationScores(bootstrap=0)
    metric.bind(("a", "b"), False, ("x", "y", "z"))
    metric.update(logits, labels, torch.tensor([3, 2, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 0]))
    got = metric.compute()
    assert got["accuracy/x"] == 0.5
    assert got["accuracy/y"] == 1.0
    assert "accuracy/z" not in got
    assert metric.predictions().places.tolist() == [0, 1, 2, 3]
    assert metric.predictions().labels.tolist() == [1, 0, 1, 0]


def test_intervals_are_those_of_a_mean() -> None:
    n = 1000
    metric = ClassificationScores(bootstrap=300)
    metric.bind(("a", "b"), False, ())
    labels = torch.from_numpy(RANDOM.integers(2, size=n))
    right = torch.from_numpy(RANDOM.random(n) < 0.8)
    logits = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float()
    metric.update(logits, labels, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    got = metric.scores(metric.predictions(), intervals=True)
    p = got["accuracy"]
    assert got["accuracy_ci"] == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, rel=0.15)
    assert got == metric.scores(metric.predictions(), intervals=True), "equal for equal predictions"


def test_one_resample_is_refused() -> None:
    with pytest.raises(UserError, match=r"metric.bootstrap=1"):
        ClassificationScores(bootstrap=1)
