"""Steps that would spoil the weights: raised, left out or gone back from, alike on all devices, and replayed."""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path

import pytest
import torch

from lmexp.contracts import Diverged, UserError
from lmexp.job.train import train
from lmexp.tokenizer.tokenizer import Tokenizer
from tests.runs import TINY, assert_same, checkpoint, plan, run, scalars

STEPS = 30


def tilde(folder: Path) -> int:
    """Its id."""
    (row,) = Tokenizer.load(folder / "tokenizer.json").encode(["~"])
    return int(row[0])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that meets a sample which makes its loss NaN: the only one that holds a tilde."""
    folder = tmp_path_factory.mktemp("planted")
    text = " ".join(("the", "model", "reads", "a", "line")[i % 5] for i in range(700))
    (folder / "text.txt").write_text(text[:1500] + "~" + text[1500:], encoding="utf-8")
    args = [*TINY, f"data.corpus.path={folder / 'text.txt'}", f"paths.cache_dir={folder / 'cache'}"]
    args += ["model=llama", "model.tied=false", "validate_every=5", "log_every=4", "data.corpus.by=tail"]
    train(plan(*args, "max_steps=1", f"paths.run_dir={folder / 'first'}"))
    content = checkpoint(folder / "first")
    content["state_dict"]["model.embed.weight"][tilde(folder / "first")] = math.nan
    torch.save(content, folder / "planted.ckpt")
    return [*args, f"init_from={folder / 'planted.ckpt'}", f"max_steps={STEPS}"]


def test_raise_says_where_and_replay_shows_what(planted: list[str], tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="job=replay") as caught:
        train(plan(*planted, f"paths.run_dir={tmp_path / 'run'}"))
    (record_file,) = (tmp_path / "run" / "flight").glob("step-*.json")
    record = json.loads(record_file.read_text())
    assert f"diverged at step {record['step'] + 1}" in str(caught.value)
    bad = [n for n, text in enumerate(record["texts"]) if "~" in text]
    assert len(bad) == 1
    assert record["layers"]["model.embed.weight"].keys() == {"weight_norm", "summed_grad_norm"}

    done = run("job=replay", f"ckpt={tmp_path / 'run'}", f"out={tmp_path / 'report.json'}", "trainer=cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["step"] == record["step"]
    assert math.isnan(report["grad_norm"])
    wrong = [s for s in report["samples"] if not math.isfinite(s["loss"])]
    assert [s["sample"] for s in wrong] == [record["samples"][0] + bad[0]]
    assert "~" in wrong[0]["text"]
    assert report["first_not_finite"] == "embed"
    assert "first output that is not finite is that of embed" in done.stdout


def test_a_pair_that_shares_its_row_is_found(tmp_path: Path) -> None:
    """In batches of as many pairs as fit, after the run has gone back once: the sample and nothing beside it."""
    pairs = [(f"line {i} {'~' if i in (60, 61) else 'x' * (i % 9)}", f"Zeile {i}") for i in range(120)]
    for column, name in enumerate(("en", "de")):
        (tmp_path / name).write_text("\n".join(pair[column] for pair in pairs), encoding="utf-8")
        (tmp_path / f"v.{name}").write_text("\n".join(pair[column] for pair in pairs[:9]), encoding="utf-8")
    files, held_out = (f"{{en:{tmp_path}/{prefix}en,de:{tmp_path}/{prefix}de}}" for prefix in ("", "v."))
    args = [*(o for o in TINY if o != "data=files" and not o.startswith(("data.", "batch_size")))]
    args += ["data=parallel_files", "data.corpus.use=pairs", f"data.corpus.train={files}", "data.block_size=48"]
    args += [
        f"data.corpus.validation={held_out}",
        f"paths.cache_dir={tmp_path / 'cache'}",
        "model=transformer",
    ]
    args += ["objective=text_to_text", "batch_size=null", "data.batch_tokens=200", "validate_every=3", "max_steps=12"]
    args += ["model.dropout=0", "model.tied=false"]
    train(plan(*args, "max_steps=1", f"paths.run_dir={tmp_path / 'first'}"))
    content = checkpoint(tmp_path / "first")
    content["state_dict"]["model.embed.weight"][tilde(tmp_path / "first")] = math.nan
    torch.save(content, tmp_path / "planted.ckpt")
    args += [f"init_from={tmp_path / 'planted.ckpt'}", "callback.guard.policy=rollback", "max_steps=40"]
    with pytest.raises(Diverged, match="had gone back 1 times"):
        train(plan(*args, "callback.guard.most=1", f"paths.run_dir={tmp_path / 'run'}"))
    records = list((tmp_path / "run" / "flight").glob("step-*.json"))
    assert sorted(json.loads(r.read_text())["from_sample"] > 0 for r in records) == [False, True]
    for record_file in records:
        record = json.loads(record_file.read_text())
        out = tmp_path / "report.json"
        done = run("job=replay", f"ckpt={tmp_path / 'run'}", f"job.record={record_file}", f"out={out}", "trainer=cpu")
        assert done.returncode == 0, done.stderr
        report = json.loads(out.read_text())
        first, last = record["samples"]
        assert sorted(s["sample"] for s in report["samples"]) == list(range(first, last + 1))
        assert all(("~" in s["text"]) == (not math.isfinite(s["loss"])) for s in report["samples"])
        assert any("~" in s["text"] for s in report["samples"])
        assert [s["text"] for s in report["samples"]] != record["texts"]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_one_process_goes_on(planted: list[str], tmp_path: Path, policy: str) -> None:
    args = [*planted, f"callback.guard.policy={policy}"]
    loss = train(plan(*args, f"paths.run_dir={tmp_path / 'run'}"))
    assert math.isfinite(loss)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == STEPS
    records = len(list((tmp_path / "run" / "flight").glob("step-*.json")))
    assert records > 1, "it happens again after a checkpoint that counted the first"
    assert metrics["guard/skipped" if policy == "skip" else "guard/rolled_back"] == records
    curves = scalars(tmp_path / "run")
    assert [s for s, _ in curves["train/loss"]] == list(range(1, STEPS + 1))
    assert [s for s, v in curves["train/loss"] if math.isnan(v)] == (
        [json.loads(p.read_text())["step"] + 1 for p in sorted((tmp_path / "run" / "flight").glob("*.json"))]
        if policy == "skip"
        else []
    )
    if policy == "rollback":
        passed = checkpoint(tmp_path / "run")["TextData"]["samples"] - STEPS * 8
        assert passed > 0
        assert passed % 8 == 0


def test_skip_leaves_everything_as_it_was(planted: list[str], tmp_path: Path) -> None:
    """The run that stops right before the step, and one that goes one step on over it, hold the same weights."""
    args = [*planted, "callback.guard.policy=skip", "callback.checkpoint.every_steps=1", "callback.checkpoint.keep=99"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'run'}"))
    record = json.loads(min((tmp_path / "run" / "flight").glob("step-*.json")).read_text())
    before, after = (checkpoint(tmp_path / "run", f"step-{record['step'] + n:09d}.ckpt") for n in (0, 1))
    for weights in (before["state_dict"], after["state_dict"]):
        assert weights.pop("model.embed.weight")[tilde(tmp_path / "run")].isnan().all()
    assert_same(before["state_dict"], after["state_dict"])
    for a, b in zip(before["optimizer_states"], after["optimizer_states"], strict=True):
        assert_same(a["state"], b["state"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer", [("trainer=ddp_sim",), ("trainer=tp_fsdp_sim", "callback.checkpoint.sharded=true")], ids=["ddp", "tp"]
)
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_two_processes_agree(planted: list[str], tmp_path: Path, policy: str, trainer: tuple[str, ...]) -> None:
    """Bar: both ranks end with a finite loss at the same step; as one process does."""
    args = [*planted, f"callback.guard.policy={policy}"]
    done = run(*args, *trainer, f"paths.run_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    train(plan(*args, f"paths.run_dir={tmp_path / 'one'}"))
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert two["val/loss"] == pytest.approx(one["val/loss"], rel=1e-4)
    for tag in ("guard/skipped", "guard/rolled_back", "steps"):
        assert one.get(tag) == two.get(tag)
    shown = run("job=replay", f"ckpt={tmp_path / 'two'}", "trainer=cpu")
    assert shown.returncode == 0, shown.stderr
    assert "nan" in shown.stdout
    assert "~" in shown.stdout


def test_a_run_that_does_nothing_but_skip_ends(planted: list[str], tmp_path: Path) -> None:
    args = [*planted, "callback.guard.policy=skip", "callback.guard.most=3", "callback.guard.spike=1.0001"]
    with pytest.raises(Diverged, match="3 steps before it were left out"):
        train(plan(*args, "max_steps=200", "optimizer=adamw", "optimizer.lr=3.0", f"paths.run_dir={tmp_path / 'run'}"))


def test_a_spike_is_left_out(planted: list[str], tmp_path: Path) -> None:
    args = [*planted, "callback.guard.policy=skip", "callback.guard.spike=1.05", "optimizer.lr=0.3", "max_steps=60"]
    args += ["callback.guard.most=1000", f"paths.run_dir={tmp_path / 'run'}"]
    train(plan(*args))
    records = [json.loads(p.read_text()) for p in (tmp_path / "run" / "flight").glob("step-*.json")]
    spikes = [r for r in records if "times the usual" in r["why"]]
    assert spikes
    assert all(r["grad_norm"] > 0 and r["step"] >= 20 for r in spikes)
    skipped = json.loads((tmp_path / "run" / "metrics.json").read_text())["guard/skipped"]
    assert skipped > len(spikes)  # the planted one besides; records are of the first ten
    assert scalars(tmp_path / "run")["guard/skipped"][-1][1] == skipped


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_sim"])
def test_a_spike_of_the_loss_is_left_out(tmp_path: Path, trainer: str) -> None:
    """What is all right by its gradient; the mean over all devices, not that of one."""
    noise = random.Random(0)
    parts = ["the model reads a line " * 40 + "".join(noise.choices(string.ascii_letters, k=40)) for _ in range(8)]
    (tmp_path / "text.txt").write_text(" ".join(parts), encoding="utf-8")  # a few blocks are hard
    args = [*TINY, f"data.corpus.path={tmp_path / 'text.txt'}"]
    args += [f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={tmp_path / 'run'}"]
    args += ["callback.guard.policy=skip", "callback.guard.loss_spike=0.1", "callback.guard.most=1000"]
    done = run(*args, "schedule=constant", "optimizer.lr=0.3", "max_steps=90", f"trainer={trainer}")
    assert done.returncode == 0, done.stderr
    losses = dict(scalars(tmp_path / "run")["train/loss"])
    average, seen, left_out = 0.0, 0, set()
    for step in range(90):
        loss = losses[step + 1]
        if seen >= 20 and loss - average > 0.1:
            left_out.add(step)
            continue
        average += (loss - average) * max(0.05, 1 / (seen + 1))
        seen += 1
    assert left_out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["guard/skipped"] == len(left_out)
    told = [json.loads(p.read_text()) for p in (tmp_path / "run" / "flight").glob("step-?????????.json")]
    assert {r["step"] for r in told} == set(sorted(left_out)[:10])
    assert all("above the usual" in r["why"] for r in told)

    # from a run that did not look at its losses: what is usual has to be seen first
    plain = [a for a in args if not a.startswith(("callback.guard.loss_spike", "paths.run_dir"))]
    plain += [f"paths.run_dir={tmp_path / 'plain'}", "schedule=constant", "optimizer.lr=0.3", f"trainer={trainer}"]
    assert run(*plain, "max_steps=30").returncode == 0
    done = run(*plain, "max_steps=40", "resume=auto", "callback.guard.loss_spike=0.1", "callback.guard.policy=raise")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("callback.guard.policy=ignore", "expected raise, skip or rollback"),
        ("callback.guard.spike=1", "expected a factor above 1"),
        ("callback.guard.loss_spike=0", "expected nats above 0"),
        ("callback.guard.most=0", "expected a whole number of at least 1"),
    ],
)
def test_mistakes(planted: list[str], tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        train(plan(*planted, override, f"paths.run_dir={tmp_path / 'run'}"))


def test_replay_without_a_record(tmp_path: Path) -> None:
    done = run("job=replay", f"ckpt={tmp_path}")
    assert done.returncode == 2
    assert "holds no record" in done.stderr
