"""What tasks show in TensorBoard: their figures say what the predictions do, and every run has its pages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lmexp.callback.predictions import confusion, confusions, precision_recall, reliability
from lmexp.job.evaluate import evaluate
from lmexp.job.train import train
from lmexp.metric.classification import Predictions
from tests.job import test_job_classification as labels
from tests.job import test_job_text_to_text as texts
from tests.runs import pages, plan, scalars


def told(probabilities: torch.Tensor, labels: torch.Tensor) -> Predictions:
    n = len(labels)
    return Predictions(probabilities, labels, torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n))


@pytest.fixture
def single() -> Predictions:
    torch.manual_seed(0)
    return told(torch.randn(200, 3).mul(2).softmax(-1), torch.randint(3, (200,)))


@pytest.fixture
def several() -> Predictions:
    torch.manual_seed(0)
    return told(torch.rand(200, 3), torch.randint(2, (200, 3)))


def test_the_confusion_matrix_is_scikit_learns(single, several) -> None:
    from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix

    shown = [int(text.get_text()) for text in confusion(single, ("a", "b", "c")).axes[0].texts]
    assert shown == confusion_matrix(single.labels, single.probabilities.argmax(-1)).flatten().tolist()
    shown = [int(text.get_text()) for text in confusions(several, ("a", "b", "c")).axes[0].texts]
    expected = []
    for (not_told, wrongly), (missed, right) in multilabel_confusion_matrix(
        several.labels.numpy(), several.probabilities.numpy() >= 0.5
    ).tolist():
        expected += [right, missed, wrongly, not_told]
    assert shown == expected


def test_the_reliability_diagram_is_scikit_learns(single, several) -> None:
    from sklearn.calibration import calibration_curve

    sure = single.probabilities.max(-1)
    for predictions, right, certain in (
        (single, sure.indices == single.labels, sure.values),
        (several, several.labels.flatten(), several.probabilities.flatten()),
    ):
        upper, lower = reliability(predictions).axes
        mean, share = upper.lines[1].get_data()
        expected_share, expected_mean = calibration_curve(right.numpy(), certain.numpy(), n_bins=len(lower.patches))
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
        np.testing.assert_allclose(share, expected_share, rtol=1e-5)
        assert sum(bar.get_height() for bar in lower.patches) == len(certain)


def test_precision_and_recall_are_scikit_learns(single, several) -> None:
    from sklearn.metrics import precision_recall_curve

    for predictions in (single, several):
        lines = precision_recall(predictions, ("a", "b", "c")).axes[0].lines
        assert [line.get_label() for line in lines] == ["a", "b", "c"]
        for number, line in enumerate(lines):
            right = predictions.labels == number if predictions is single else predictions.labels[:, number]
            precision, recall, _ = precision_recall_curve(right.numpy(), predictions.probabilities[:, number].numpy())
            points = set(zip(np.round(recall, 6), np.round(precision, 6), strict=True))
            drawn = set(zip(*(np.round(x, 6) for x in line.get_data()), strict=True))
            # theirs has an end at recall 0 besides, and leaves out what follows full recall
            assert {p for p in points if p[0] > 0} <= drawn


@pytest.mark.parametrize("kind", ["single", "multilabel"])
def test_the_pages_of_a_classifier(tmp_path: Path, kind: str) -> None:
    run_dir = tmp_path / "run"
    train(plan(*labels.arguments(tmp_path, kind), "callback.predictions.shown=3", f"paths.run_dir={run_dir}"))
    found, hparams = pages(run_dir)
    for tag in ("confusion", "reliability", "precision_recall"):
        assert [step for step, _ in found[tag]] == [3, 6], tag
        assert all(picture.min() < 250 for _, picture in found[tag]), "something is drawn"
    assert [step for step, _ in found["mistakes"]] == [3, 6]
    header, _, *rows = found["mistakes"][0][1].splitlines()
    assert header == "| sure | text | label | told |"
    assert 1 <= len(rows) <= 3
    metrics = json.loads((run_dir / "metrics.json").read_text())
    check_test_scores(run_dir, found, hparams, metrics, ("loss", "accuracy", "f1", "matthews", "auroc", "ece"))
    shown = next(r.experiment for r in hparams if r.HasField("experiment")).metric_infos
    assert {"test/accuracy/k0", "val/accuracy/k1"} <= {info.name.tag for info in shown}
    started = next(r.session_start_info for r in hparams if r.HasField("session_start_info"))
    assert started.hparams["objective"].string_value == started.hparams["task"].string_value == "classification"


def check_test_scores(run_dir: Path, found, hparams, metrics, names) -> None:
    """They stand as scalars, in HPARAMS and on a page with their intervals."""
    curves = scalars(run_dir)
    infos = next(r.experiment for r in hparams if r.HasField("experiment")).metric_infos
    shown = {info.name.tag for info in infos}
    ((step, page),) = found["test"]
    assert step == metrics["test/step"] == torch.load(run_dir / "checkpoints" / "best.ckpt")["lmexp"]["step"]
    for name in names:
        assert curves[f"test/{name}"] == [(step, pytest.approx(metrics[f"test/{name}"], rel=1e-6))], name
        assert {f"val/{name}", f"test/{name}"} <= shown
        assert f"| test/{name} | {metrics[f'test/{name}']:.4g} | ± {metrics[f'test/{name}_ci']:.2g} |" in page


def test_the_pages_of_a_translation(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = [*texts.arguments(tmp_path), f"paths.run_dir={run_dir}"]
    train(plan(*args))
    found, hparams = pages(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    check_test_scores(run_dir, found, hparams, metrics, ("bleu", "chrf", "ter", "exact_match", "length_ratio"))
    assert "BLEU|nrefs:1|" in found["test"][0][1]
    assert [step for step, _ in found["answers"]] == [3, 6]
    header, _, *rows = found["answers"][1][1].splitlines()
    assert header == "| chrF | source | reference | output |"
    assert len(rows) == 4  # the two worst and the two best
    cells = [row.strip("| ").split(" | ") for row in rows]
    ranks = [int(cell[0]) for cell in cells]
    assert ranks == sorted(ranks)
    # of source and target in one width, which side is which
    ((step, picture),) = found["attention/5-target-over-source"]
    assert step == 6
    assert picture.min() < 50
    started = next(r.session_start_info for r in hparams if r.HasField("session_start_info"))
    assert started.hparams["decoding"].string_value == "greedy"

    # with more steps the test split is scored again, and once in all
    train(plan(*args, "max_steps=9", "resume=auto"))
    found, hparams = pages(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    check_test_scores(run_dir, found, hparams, metrics, ("bleu",))
    assert metrics["steps"] == 9
    out = tmp_path / "out.json"
    evaluate(plan("job=evaluate", f"ckpt={run_dir}", "job.split=test", f"out={out}", "trainer=cpu"))
    assert json.loads(out.read_text())["signature"].startswith("BLEU|nrefs:1|")
