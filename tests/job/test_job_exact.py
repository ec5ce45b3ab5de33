"""The numbers do not depend on how the batch is split over devices and micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import TINY, checkpoint, corpus, run, scalars

SPLITS = {
    "one": [],
    "accumulated": ["trainer.micro_batch_size=2"],
    "two": ["trainer=ddp_sim"],
    "two_accumulated": ["trainer=ddp_sim", "trainer.micro_batch_size=1"],
}


def train(folder: Path, name: str, *more: str) -> Path:
    out = folder / name
    done = run(
        *TINY,
        *SPLITS[name],
        *more,
        corpus(folder),
        f"paths.cache_dir={folder / 'cache'}",
        "max_steps=20",
        "validate_every=10",
        "log_every=5",
        f"paths.run_dir={out}",
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_batch_splits_agree(tmp_path: Path, optimizer: str) -> None:
    runs = {name: train(tmp_path, name, f"optimizer={optimizer}", "optimizer.lr=0.003") for name in SPLITS}
    one = scalars(runs.pop("one"))
    for name, folder in runs.items():
        other = scalars(folder)
        for tag in ("train/loss", "optim/grad_norm", "val/loss", "val/bits_per_byte", "train/bits_per_byte"):
            assert [step for step, _ in one[tag]] == [step for step, _ in other[tag]]
            expected = pytest.approx([value for _, value in one[tag]], rel=1e-5)
            assert [value for _, value in other[tag]] == expected, f"{name} {tag}"
        seen = [checkpoint(f)["TextData"]["samples"] for f in (tmp_path / "one", folder)]
        assert seen == [160, 160]


@pytest.mark.slow
def test_evaluation_of_seven_documents_is_the_same_on_two_processes(tmp_path: Path) -> None:
    trained = train(tmp_path, "one")
    (tmp_path / "seven.txt").write_text("\n".join(f"document {i} reads {'a line ' * i}" for i in range(7)))
    values = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.json"
        done = run(
            "job=evaluate",
            f"ckpt={trained}",
            "data=files",
            "data.block_size=16",
            f"data.corpus.train={tmp_path / 'seven.txt'}",
            f"data.corpus.validation={tmp_path / 'seven.txt'}",
            "data.corpus.unit=line",
            f"out={out}",
            f"paths.cache_dir={tmp_path / 'cache'}",
            *(SPLITS[name] or ["trainer=cpu"]),
        )
        assert done.returncode == 0, done.stderr
        values.append(json.loads(out.read_text()))
    assert values[0]["tokens"] == values[1]["tokens"] > 0
    assert values[0] == pytest.approx(values[1], rel=1e-6)  # float32 over other batches
