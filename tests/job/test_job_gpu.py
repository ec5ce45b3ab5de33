"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmexp.job.evaluate import evaluate
from lmexp.job.train import train
from tests.runs import TINY, assert_same, checkpoint, corpus, plan, scalars

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    tiny = [o for o in TINY if not o.startswith("trainer")]
    paths = [corpus(folder), f"paths.cache_dir={folder / 'cache'}", f"paths.run_dir={folder / name}"]
    return [*tiny, *paths, "max_steps=12", "validate_every=6", "log_every=3", *more]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_float32_agrees_with_the_cpu(tmp_path: Path, optimizer: str) -> None:
    more = [f"optimizer={optimizer}", "optimizer.lr=0.003", "trainer.precision=32-true", "trainer.compile=false"]
    train(plan(*arguments(tmp_path, "cpu", "trainer=cpu", *more)))
    train(plan(*arguments(tmp_path, "gpu", "trainer=gpu", *more)))
    # Muon orthogonalises in bf16 on CUDA, so that its updates differ by about a hundredth
    rel = 2e-2 if optimizer == "muon" else 1e-4
    cpu, gpu = (scalars(tmp_path / name) for name in ("cpu", "gpu"))
    assert [v for _, v in cpu["train/loss"]] == pytest.approx([v for _, v in gpu["train/loss"]], rel=rel)


@pytest.mark.parametrize("compile", ["true", "false"])
def test_bf16_trains_and_is_measured(tmp_path: Path, compile: str) -> None:
    train(plan(*arguments(tmp_path, "run", "trainer=gpu", f"trainer.compile={compile}")))
    curves = scalars(tmp_path / "run")
    losses = [v for _, v in curves["train/loss"]]
    assert losses[-1] < losses[0]
    assert curves["memory/gib"][-1][1] > 0
    weights = checkpoint(tmp_path / "run")["state_dict"].values()
    assert {w.dtype for w in weights} == {torch.float32}
    measured = evaluate(plan("job=evaluate", f"ckpt={tmp_path / 'run'}", "trainer=gpu", "trainer.compile=false"))
    assert measured == pytest.approx(checkpoint(tmp_path / "run")["lmexp"]["best"]["score"], rel=1e-2)


def test_resume_is_exact(tmp_path: Path) -> None:
    more = ["trainer=gpu", "trainer.compile=false", "model=gpt", "model.dropout=0.1"]
    train(plan(*arguments(tmp_path, "parts", *more, "max_steps=6", "schedule=constant")))
    train(plan(*arguments(tmp_path, "parts", *more, "schedule=constant", "resume=auto")))
    train(plan(*arguments(tmp_path, "constant", *more, "schedule=constant")))
    one, two = checkpoint(tmp_path / "constant"), checkpoint(tmp_path / "parts")
    for key in ("state_dict", "optimizer_states"):
        assert_same(one[key], two[key], key)
