"""Sweeps: what is done is kept, what is missing is run, and what went wrong is told as that."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lmexp.contracts import UserError
from lmexp.job import pool, sweep_report
from lmexp.job.launch import Outcome, Ranks, run_here
from lmexp.job.search import Interval, Search, SweepSettings, front, running_trial
from lmexp.run.ledger import Entry, Ledger, key_of
from tests.runs import ROOT, TINY, command, corpus, plan, run

HERE = Path(__file__).parent


def sweeping(folder: Path, *more: str) -> list[str]:
    return [
        "-m",
        *TINY,
        corpus(folder),
        f"paths.cache_dir={folder / 'cache'}",
        "max_steps=6",
        "validate_every=3",
        "log_every=1",
        "trainer.threads=1",
        f"hydra.sweep.dir={folder / 'sweep'}",
        *more,
    ]


def planted(*, crash: str, spoil: str) -> list[str]:
    return [f"+callback.planted={{_target_: planted.Planted, crash: {crash}, spoil: {spoil}}}"]


def environment(arguments: tuple[str, ...] | list[str]) -> dict[str, str]:
    folder = next((Path(a.split("=", 1)[1]).parent for a in arguments if a.startswith("hydra.sweep.dir=")), "")
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{HERE}", "TEST_FOLDER": str(folder)}


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(arguments), timeout=500)


def entries(folder: Path) -> dict[tuple[str, ...], Entry]:
    return {tuple(e.point.values()): e for e in Ledger(folder / "sweep").entries()}


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that were started for a test with this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TEST_FOLDER={folder}".encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 12 jobs of two processes each, some of them twice
@pytest.mark.parametrize("devices", [1, 2])
def test_a_sweep_that_is_killed_goes_on(
    tmp_path: Path, devices: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Bar: 12 jobs, one crashes, one diverges, the controller is killed midway."""
    args = sweeping(
        tmp_path,
        "optimizer.lr=0.01,0.02",
        "model.n_layers=1,2",
        "seeds=3",
        *planted(crash="[0.01,2]", spoil="[0.02,3]"),
        *(["trainer=ddp_sim", "trainer.devices=2"] if devices == 2 else []),
    )
    scratch = Path(tempfile.mkdtemp())  # no deeper: it holds sockets, whose paths may not be long
    request.addfinalizer(lambda: shutil.rmtree(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    first = subprocess.Popen(
        command(*args),
        env=environment(args),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ledger = Ledger(tmp_path / "sweep")
    while sum(e.status == "done" for e in ledger.entries() if ledger.exists()) < 3:
        assert first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done_before = {e.key: (Path(e.run_dir) / "metrics.json").stat().st_mtime_ns for e in ledger.entries() if e.metrics}
    done = sweep(*args)
    assert done.returncode == 1, done.stderr
    assert "4 of the sweep's jobs failed" in done.stderr  # each planted point has two values of n_layers
    found = ledger.entries()
    assert len(found) == 12
    directories = [p for p in (tmp_path / "sweep").iterdir() if (p / "checkpoints").is_dir()]
    assert len(directories) == 12
    for entry in found:
        lr, _, seed = entry.point.values()
        if (lr, seed) == ("0.01", "2"):
            assert entry.status == "failed"
            assert "planted crash" in entry.said
        elif (lr, seed) == ("0.02", "3"):
            assert entry.status == "diverged"
            assert "diverged at step 4" in entry.said
        else:
            assert entry.status == "done"
            metrics = Path(entry.run_dir) / "metrics.json"
            assert json.loads(metrics.read_text()) == entry.metrics
            if entry.key in done_before:
                assert metrics.stat().st_mtime_ns == done_before[entry.key]
                assert entry.attempts == 1
    assert not processes_of(tmp_path)  # and with them no port

    assert not [path for path in scratch.iterdir() if not path.name.startswith("torchinductor_")]  # torch's own cache

    # the report's numbers are those of the jobs, each run by itself
    table = csv.DictReader((tmp_path / "sweep" / "report.csv").read_text().splitlines())
    rows = {tuple(row[key] for key in found[0].point): row for row in table}
    assert len(rows) == 12
    alone = [o for o in args[1:] if not o.startswith(("hydra.", "seeds", "optimizer.lr", "model.n_layers"))]
    good = [entry for entry in found if entry.status == "done"]
    monkeypatch.syspath_prepend(HERE)  # where `planted` is
    for number, entry in enumerate(good if devices == 1 else good[:1]):
        run_dir = tmp_path / f"alone-{number}"
        args = [*alone, *(f"{key}={value}" for key, value in entry.point.items()), f"paths.run_dir={run_dir}"]
        if devices == 1:
            run_here(plan(*args))
        else:
            again = sweep(*args)
            assert again.returncode == 0, again.stderr
        expected = json.loads((run_dir / "metrics.json").read_text())
        row = rows[tuple(entry.point.values())]
        for name in ("val/loss", "train/loss", "val/bits_per_byte"):
            assert float(row[name]) == entry.metrics[name] == expected[name]


@pytest.mark.slow
def test_a_sweep_grows_and_runs_only_what_is_missing(tmp_path: Path) -> None:
    first = sweep(*sweeping(tmp_path, "optimizer.lr=0.01,0.02", "~data.bpe_dropout"))  # a key that came later
    assert first.returncode == 0, first.stderr
    assert not processes_of(tmp_path)
    before = {e.key: e.attempts for e in Ledger(tmp_path / "sweep").entries()}
    # 1 is the default, and how the batches are made and when it is saved is no matter: the same jobs
    same = ("seed=1", "data.num_workers=1", "callback.checkpoint.every_steps=5")
    grown = sweep(*sweeping(tmp_path, "optimizer.lr=0.01,0.02,0.03", *same))
    assert grown.returncode == 0, grown.stderr
    assert "3 jobs, 2 of them done already" in grown.stdout
    after = {e.key: e.attempts for e in Ledger(tmp_path / "sweep").entries()}
    assert before.items() <= after.items()
    assert len(after) == 3

    report = run("job=sweep_report", f"job.sweep={tmp_path / 'sweep'}")
    assert report.returncode == 0, report.stderr
    assert "0.03" in report.stdout
    rows = list(csv.DictReader((tmp_path / "sweep" / "report.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["done"] * 3
    assert not (tmp_path / "sweep" / "means.csv").exists()  # of one seed
    for row in rows:
        metrics = json.loads((tmp_path / "sweep" / row["run"] / "metrics.json").read_text())
        assert float(row["val/loss"]) == metrics["val/loss"]
    assert (tmp_path / "sweep" / "parallel.png").read_bytes().startswith(b"\x89PNG")

    (gone,) = [e for e in Ledger(tmp_path / "sweep").entries() if e.point["optimizer.lr"] == "0.02"]
    shutil.rmtree(gone.run_dir)  # it is stale: what it computed is no longer there
    stale = sweep(*sweeping(tmp_path, "optimizer.lr=0.01,0.02,0.03"))
    assert stale.returncode == 0, stale.stderr
    assert "3 jobs, 2 of them done already" in stale.stdout
    assert (Path(gone.run_dir) / "metrics.json").exists()

    # another launcher: Hydra's own, in this process, which our jobs do not run in
    other = sweep(*sweeping(tmp_path, "optimizer.lr=0.01,0.04", "hydra/launcher=basic"))
    assert other.returncode == 0, other.stderr
    by_lr = {e.point["optimizer.lr"]: e for e in Ledger(tmp_path / "sweep").entries()}
    assert by_lr["0.04"].status == "done"
    assert by_lr["0.01"].attempts == 1

    # another sweeper: Hydra's own, with our launcher
    args = [a for a in sweeping(tmp_path, "optimizer.lr=0.05", "hydra/sweeper=basic") if "sweep.dir" not in a]
    basic = sweep(*args, f"hydra.sweep.dir={tmp_path / 'basic'}")
    assert basic.returncode == 0, basic.stderr
    assert [e.status for e in Ledger(tmp_path / "basic").entries()] == ["done"]


def check_launcher(folder: Path, *launcher: str) -> None:
    """Another launcher's jobs write into the same ledger, and a sweep here knows what they did."""
    planting = planted(crash="[0.01,1]", spoil="[9,9]")
    done = sweep(*sweeping(folder, "optimizer.lr=0.01,0.02", *launcher, *planting))
    assert done.returncode == 1, done.stderr
    found = {e.point["optimizer.lr"]: e for e in Ledger(folder / "sweep").entries()}
    assert (found["0.01"].status, found["0.02"].status) == ("failed", "done")
    assert "planted crash" in found["0.01"].said
    here = sweep(*sweeping(folder, "optimizer.lr=0.02", *planting))
    assert "1 jobs, 1 of them done already" in here.stdout


@pytest.mark.slow
def test_a_sweep_over_submitit(tmp_path: Path) -> None:
    """The launcher for SLURM, by its executor for the machine at hand; its jobs write into the same ledger."""
    pytest.importorskip("submitit")
    check_launcher(tmp_path, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")


@pytest.mark.slow
def test_submitit_starts_a_job_again_that_was_told_to_stop(tmp_path: Path) -> None:
    """As SLURM's requeue: the signal some time before the limit, a checkpoint, the same job from there."""
    pytest.importorskip("submitit")
    where = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60")
    args = sweeping(tmp_path, "optimizer.lr=0.01", *where, "max_steps=900")
    process = subprocess.Popen(
        command(*args), env=environment(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "sweep").glob("*/checkpoints/*.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    tasks = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            line = path.read_bytes()
            tasks += [int(path.parent.name)] * (b"submitit.core._submit" in line and str(tmp_path).encode() in line)
    (task,) = tasks
    os.kill(task, signal.SIGUSR2)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    (entry,) = Ledger(tmp_path / "sweep").entries()
    assert (entry.status, entry.attempts, entry.metrics["steps"]) == ("done", 2, 900)
    assert "Going on from" in Ledger(tmp_path / "sweep").console(entry.key).read_text()


@pytest.mark.slow
def test_other_launchers_try_again(tmp_path: Path) -> None:
    one = ("optimizer.lr=0.01,0.02", "hydra/launcher=basic", *planted(crash="[0.01,1]", spoil="[9,9]"))
    done = sweep(*sweeping(tmp_path, *one, "sweep.on_fail=retry:2"))
    assert done.returncode == 1
    assert [(e.status, e.attempts) for e in Ledger(tmp_path / "sweep").entries()] == [("failed", 3), ("done", 1)]


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[None]:
    """A cluster of one machine."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    ray = Path(sys.executable).with_name("ray")
    quiet = {"env": environment(()), "capture_output": True, "check": True, "timeout": 120}
    if subprocess.run([ray, "status"], capture_output=True, timeout=120).returncode == 0:
        pytest.skip("a Ray cluster is up here, which this test would join and end")
    where = ("--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats")
    try:
        try:
            subprocess.run([ray, "start", *where], **quiet)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"no Ray head can be started here: {error}")
        yield
    finally:
        subprocess.run([ray, "stop", "--force"], **quiet)


@pytest.mark.slow
def test_a_sweep_over_ray(tmp_path: Path, ray_head: None) -> None:
    check_launcher(tmp_path, "hydra/launcher=ray_cluster")


@pytest.mark.slow
def test_a_signal_stops_a_sweep_and_its_jobs_go_on(tmp_path: Path) -> None:
    args = sweeping(tmp_path, "optimizer.lr=0.01,0.02", "max_steps=4000", "sweep.slots=1")
    process = subprocess.Popen(
        command(*args), env=environment(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "sweep").glob("*/checkpoints/*.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"hydra.sweep.dir={tmp_path / 'sweep'}" in said
    found = Ledger(tmp_path / "sweep").entries()
    assert sorted(e.status for e in found) == ["stopped", "waiting"]
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_stop_and_retry(tmp_path: Path) -> None:
    one = ("optimizer.lr=0.01,0.02", "sweep.slots=1", *planted(crash="[0.01,1]", spoil="[9,9]"))
    stopped = sweep(*sweeping(tmp_path, *one, "sweep.on_fail=stop"))
    assert stopped.returncode == 1
    assert [e.status for e in Ledger(tmp_path / "sweep").entries()] == ["failed", "waiting"]
    again = sweep(*sweeping(tmp_path, *one, "sweep.on_fail=retry:1"))
    assert again.returncode == 1
    assert [(e.status, e.attempts) for e in Ledger(tmp_path / "sweep").entries()] == [("failed", 3), ("done", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pruner",
    [
        ("sweep.pruner=median", "sweep.pruner_startup=1"),
        ("sweep.pruner=halving", "sweep.pruner_warmup=3"),
    ],
    ids=["median", "halving"],
)
def test_a_search_prunes(tmp_path: Path, pruner: tuple[str, ...]) -> None:
    args = sweeping(
        tmp_path,
        "sweep=tpe",
        "optimizer.lr=tag(log,interval(1e-4,1e-1))",
        "sweep.trials=4",
        *pruner,
        "sweep.slots=1",
        "max_steps=12",
    )
    done = sweep(*args)
    assert done.returncode == 0, done.stderr
    found = Ledger(tmp_path / "sweep").entries()
    assert [e.trial for e in found] == [0, 1, 2, 3]
    assert {e.status for e in found} <= {"done", "pruned"}
    for entry in found:
        assert (entry.metrics["steps"] < 12) == (entry.status == "pruned")
    assert any(e.status == "pruned" for e in found) or "median" in pruner[0]
    again = sweep(*args)
    assert "trial" not in again.stdout.split("Sweep, by")[0]  # nothing was run


@pytest.mark.slow
def test_a_search_by_several_numbers(tmp_path: Path) -> None:
    """And the front of it in the table and the report."""
    by = ("sweep.monitor=[val/loss,steps]", "sweep.mode=[min,min]", "sweep.trials=4", "sweep.slots=2")
    space = ("max_steps=int(interval(2,40))", "optimizer.lr=tag(log,interval(1e-3,1e-1))")
    done = sweep(*sweeping(tmp_path, "sweep=random", *space, "validate_every=1000", *by))
    assert done.returncode == 0, done.stderr
    found = Ledger(tmp_path / "sweep").entries()
    assert [e.status for e in found] == ["done"] * 4
    rows = list(csv.DictReader((tmp_path / "sweep" / "report.csv").read_text().splitlines()))
    points = [(float(row["val/loss"]), float(row["steps"])) for row in rows]
    assert [row["pareto_front"] == "yes" for row in rows] == front(points, ("min", "min"))
    again = run("job=sweep_report", f"job.sweep={tmp_path / 'sweep'}")
    assert "on the Pareto front" in again.stdout


@pytest.mark.slow
def test_a_search_by_evolution(tmp_path: Path) -> None:
    space = ("optimizer.lr=tag(log,interval(1e-3,1e-1))", "optimizer.weight_decay=interval(0.0,0.3)")
    done = sweep(*sweeping(tmp_path, "sweep=cmaes", *space, "sweep.trials=3", "sweep.slots=2"))
    assert done.returncode == 0, done.stderr
    found = Ledger(tmp_path / "sweep").entries()
    assert [(e.trial, e.status) for e in found] == [(0, "done"), (1, "done"), (2, "done")]
    assert len({tuple(e.point.values()) for e in found}) == 3


@pytest.mark.slow
def test_trials_with_the_same_values_share_what_comes_of_them(tmp_path: Path) -> None:
    """Also if the first still runs when the other is drawn."""
    space = ("sweep=random", "sweep.trials=5", "sweep.slots=2", "optimizer.lr=0.01,0.02")
    done = sweep(*sweeping(tmp_path, *space))
    assert done.returncode == 0, done.stderr
    assert [e.status for e in Ledger(tmp_path / "sweep").entries()] == ["done", "done"]
    trials = running_trial(settings(method="random", dir=str(tmp_path / "sweep"), trial=0)).study.trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 5
    assert len({(t.params["optimizer.lr"], t.value) for t in trials}) == 2


@pytest.mark.slow
def test_a_trial_is_as_good_as_its_seeds_on_average(tmp_path: Path) -> None:
    """Killed once in the midst of a trial; the search goes on from the mean of what both seeds of each trial made. The
    other job of that trial is to be tried again, too: the trial is not judged before both have ended."""
    space = ("sweep=random", "sweep.trials=3", "seeds=[4,9]", "sweep.slots=1")
    args = sweeping(
        tmp_path, *space, "optimizer.lr=tag(log,interval(1e-3,1e-1))", *planted(crash="[9,9]", spoil="[9,9]")
    )
    process = subprocess.Popen(command(*args), env=environment(args), stdout=subprocess.DEVNULL)
    ledger = Ledger(tmp_path / "sweep")
    while sum(e.status == "done" for e in ledger.entries() if ledger.exists()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    (before,) = (e for e in ledger.entries() if (e.trial, e.seed) == (1, 4))
    before.status = "failed"  # as one that a full disk ended
    ledger.write(before)
    done = sweep(*args)
    assert done.returncode == 0, done.stderr
    found = ledger.entries()
    assert [(e.trial, e.seed, e.status) for e in found] == [(n, s, "done") for n in range(3) for s in (4, 9)]
    trials = running_trial(settings(method="random", dir=str(tmp_path / "sweep"), trial=0)).study.trials
    for trial in trials:
        mine = [e for e in found if e.trial == trial.number]
        assert {e.point["optimizer.lr"] for e in mine} == {str(trial.params["optimizer.lr"])}
        assert trial.value == pytest.approx(sum(e.metrics["val/loss"] for e in mine) / 2, rel=1e-12)
    means = list(csv.DictReader((tmp_path / "sweep" / "means.csv").read_text().splitlines()))
    assert [row["runs"] for row in means] == ["2"] * 3
    other = sweep(*(a.replace("[4,9]", "[4,8]") for a in args))
    assert other.returncode == 2
    assert "seeds: was [4, 9], now [4, 8]" in other.stderr


@pytest.mark.slow
def test_values_that_do_not_fit_together_are_a_failed_trial(tmp_path: Path) -> None:
    """Each fits with the first values of the others, so it is seen only when its turn comes; the others run on."""
    values = ("schedule=cosine,constant", "optimizer.lr=0.01,${schedule.final}", "sweep.pruner=median")
    arguments = sweeping(tmp_path, *values, "sweep.slots=2")
    for _ in range(2):  # and again: there is nothing left to do
        done = sweep(*arguments)
        assert "Traceback" not in done.stderr, done.stderr
        kept = Ledger(tmp_path / "sweep").entries()
        found = {tuple(value.replace("\\", "") for value in e.point.values()): e for e in kept}  # Hydra's escapes
        assert {point: e.status for point, e in found.items()} == {
            ("cosine", "0.01"): "done",
            ("constant", "0.01"): "done",
            ("cosine", "${schedule.final}"): "done",
            ("constant", "${schedule.final}"): "failed",
        }
        assert "schedule.final" in found["constant", "${schedule.final}"].said
        assert [e.attempts for e in found.values() if e.status == "done"] == [1, 1, 1]


@pytest.mark.slow
def test_two_commands_share_a_search(tmp_path: Path) -> None:
    space = "optimizer.lr=tag(log,interval(1e-3,1e-1))"
    args = sweeping(tmp_path, "sweep=tpe", space, "sweep.trials=6", "sweep.slots=1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command(*args), env=environment(args), **pipes) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    found = Ledger(tmp_path / "sweep").entries()
    assert [(e.trial, e.status, e.attempts) for e in found] == [(n, "done", 1) for n in range(6)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["seeds=3", "seed=1,2"], "give one of the two"),
        (["seeds=0"], "seeds=0; expected a number of at least 1"),
        (["optimizer.lr=interval(0.1,1)"], "a grid needs values, not an interval"),
        (["paths.run_dir=a"], "paths.run_dir has no place in a sweep"),
        (["optimizer.lr=1,2", "sweep.on_fail=retry"], "sweep.on_fail=retry; expected continue, stop or retry:N"),
        (["optimizer.lr=1,2", "sweep.slots=0"], "sweep.slots=0; expected"),
        (["sweep=tpe"], "there is nothing to search"),
        (["sweep=cmaes", "model=gpt,llama"], "searches intervals only, and model is a list"),
        (
            ["sweep=cmaes", "optimizer.lr=interval(0.1,1)", "sweep.monitor=[val/loss,steps]", "sweep.mode=[min,min]"],
            "looks for the best of one number",
        ),
        (["sweep=tpe", "optimizer.lr=interval(1,0.1)"], "expected a lower and a higher number"),
        (
            ["sweep=tpe", "optimizer.lr=interval(0.1,1)", "seeds=3", "sweep.pruner=median"],
            "compares single runs while they go on; set sweep.pruner=null",
        ),
        (["optimizer.lr=1,2", "sweep.mode=up"], "expected min or max"),
        (["optimizer.lrr=1,2"], "optimizer.lrr"),
        (["sweep=random", "optimizer.lr=interval(0.1,1)", "schedule=linear,cosin"], "cosin"),
        (["optimizer.lr=1,2", "sweep.pruner=halving"], "needs sweep.pruner_warmup"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = sweep(*sweeping(tmp_path, *arguments))
    assert done.returncode == 2, done.stderr + done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not Ledger(tmp_path / "sweep").exists()


def test_seeds_are_for_sweeps() -> None:
    done = run(*TINY, "seeds=3")
    assert done.returncode == 2
    assert "start it with -m" in done.stderr


def test_a_report_of_nothing(tmp_path: Path) -> None:
    done = run("job=sweep_report", f"job.sweep={tmp_path}")
    assert done.returncode == 2
    assert "holds no sweep" in done.stderr


# ---- parts


def settings(**other: Any) -> SweepSettings:
    known: dict[str, Any] = {
        "method": "tpe",
        "space": {},
        "slots": 1,
        "on_fail": "continue",
        "monitor": "val/loss",
        "mode": "min",
        "trials": 30,
        "search_seed": 0,
        "pruner": None,
        "pruner_startup": 5,
        "pruner_warmup": 0,
        "pruner_factor": 3,
    }
    return SweepSettings(**(known | other))


SPACE: dict[str, Any] = {"lr": Interval(1e-4, 1.0, True, False), "n": Interval(1, 8, False, True), "kind": ["a", "b"]}


def objective(values: dict[str, str]) -> float:
    """Least at lr = 0.02, n = 5, kind b."""
    lr, n = float(values["lr"]), int(values["n"])
    return (math.log10(lr) - math.log10(0.02)) ** 2 + (n - 5) ** 2 / 10 + (values["kind"] == "a")


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_search_that_is_interrupted_tries_the_same(tmp_path: Path, method: str) -> None:
    """Bar: 30 trials, interrupted three times, at any moment between drawing and telling."""
    results = []
    for cuts in ((), (4, 13, 22)):
        folder = tmp_path / str(len(cuts))
        folder.mkdir()
        told: dict[int, float] = {}
        search = Search(settings(method=method), folder, SPACE, several=False)
        left = set(cuts)
        while True:
            again = search.unfinished()
            drawn = again[0] if again else search.next()
            if drawn is None:
                break
            number, values = drawn
            if number in left:  # the process is gone; what it had drawn is drawn
                left.discard(number)
                search = Search(settings(method=method), folder, SPACE, several=False)
                continue
            assert number not in told
            told[number] = objective(values)
            search.tell(number, [told[number]])
        assert sorted(told) == list(range(30))
        results.append(told)
    assert results[0] == results[1]
    if method == "tpe":
        assert min(results[0].values()) < 0.3


def test_failed_trials_do_not_stop_a_search(tmp_path: Path) -> None:
    search = Search(settings(trials=6), tmp_path, SPACE, several=True)
    while (drawn := search.next()) is not None:
        search.tell(drawn[0], [math.nan] if drawn[0] % 2 else None)
    assert len(search.study.trials) == 6
    assert {t.state.name for t in search.study.trials} == {"FAIL"}


def test_a_grid_with_a_pruner_tries_each_point_once(tmp_path: Path) -> None:
    space: dict[str, Any] = {"a": ["1", "2", "3"], "b": ["x", "y"]}
    search = Search(settings(method="grid", pruner="median"), tmp_path, space, several=True)
    seen = []
    while (drawn := search.next()) is not None:
        seen.append(tuple(drawn[1].values()))
        search.tell(drawn[0], None if len(seen) == 2 else [1.0])  # a point that failed is over, too
    assert sorted(seen) == sorted((a, b) for a in "123" for b in "xy")


@pytest.mark.parametrize("method", ["tpe", "grid"])
def test_a_search_whose_process_is_killed_while_it_draws(tmp_path: Path, method: str) -> None:
    """At every write to the journal, one after the other: no trial is lost, none comes twice, and all are as before."""
    from optuna.storages.journal import JournalFileBackend

    space: dict[str, Any] = {"a": ["1", "2", "3"], "b": ["x", "y"]} if method == "grid" else SPACE
    append = JournalFileBackend.append_logs
    found = []
    for deadly in (None, 3, 4, 5, 6, 11, 14):
        folder = tmp_path / str(deadly)
        folder.mkdir()
        writes = 0

        def dying(backend: Any, logs: Any, deadly: int | None = deadly) -> None:
            nonlocal writes
            writes += 1
            if writes == deadly:
                raise KeyboardInterrupt
            append(backend, logs)

        JournalFileBackend.append_logs = dying
        try:
            told: list[dict[str, str]] = []
            search = Search(settings(method=method, trials=6), folder, space, several=False)
            while True:
                try:
                    again = search.unfinished()
                    drawn = again[0] if again else search.next()
                    if drawn is None:
                        break
                    search.tell(drawn[0], [float(len(told))])
                    told.append(drawn[1])
                except KeyboardInterrupt:
                    search = Search(settings(method=method, trials=6), folder, space, several=False)
        finally:
            JournalFileBackend.append_logs = append
        found.append(told)
    assert len(found[0]) == 6
    assert found == [found[0]] * len(found)


def test_two_controllers_share_a_search(tmp_path: Path) -> None:
    a, b = (Search(settings(trials=10), tmp_path, SPACE, several=True) for _ in range(2))
    numbers = []
    for turn in range(20):
        drawn = (a, b)[turn % 2].next()
        if drawn is not None:
            numbers.append(drawn[0])
    assert numbers == list(range(10))


def test_pareto_front_against_its_definition() -> None:
    random.seed(0)
    points = [(random.randint(0, 9), random.randint(0, 9)) for _ in range(60)]
    found = front(points, ("min", "max"))
    for point, on in zip(points, found, strict=True):
        beaten = [q for q in points if q[0] <= point[0] and q[1] >= point[1] and q != point]
        assert on == (not beaten)


def test_intervals_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random.seed(1)
    for n in (2, 3, 5, 31, 32, 60):
        values = [random.gauss(3, 2) for _ in range(n)]
        low, high = stats.t.interval(0.95, n - 1, loc=stats.tmean(values), scale=stats.sem(values))
        assert sweep_report.half_width(values) == pytest.approx((high - low) / 2, rel=2e-3)
    assert math.isnan(sweep_report.half_width([1.0]))


def entry(lr: str, seed: int, loss: float | None, status: Any = "done") -> Entry:
    point = {"optimizer.lr": lr, "seed": str(seed)}
    metrics = {} if loss is None else {"val/loss": loss, "steps": 5.0}
    return Entry(key_of([lr, seed]), [], point, seed, f"s/{lr}-{seed}", status, metrics=metrics)


def test_points_and_comparisons_by_hand() -> None:
    found = [entry("0.1", 1, 2.0), entry("0.1", 2, 4.0), entry("0.2", 1, 1.0), entry("0.2", 2, 2.5)]
    found += [entry("0.2", 3, None, "diverged"), entry("0.3", 1, None, "failed")]
    found += [entry("0.3", 2, math.nan)]
    best, second, none = sweep_report.groups_of(found, "val/loss", "min")
    assert (best.point, best.mean, len(best.values)) == ({"optimizer.lr": "0.2"}, 1.75, 2)
    assert (second.point, second.mean) == ({"optimizer.lr": "0.1"}, 3.0)
    assert not none.values
    difference, half, n = sweep_report.compared(best, second)
    assert (difference, n) == (1.25, 2)
    assert half == pytest.approx(12.706 * 0.25 / math.sqrt(2) * math.sqrt(2), rel=1e-6)  # differences 1 and 1.5
    assert [g.point["optimizer.lr"] for g in sweep_report.groups_of(found, "val/loss", "max")] == ["0.1", "0.2", "0.3"]


def test_the_ledger_knows_who_holds_a_job(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    one = entry("0.1", 1, None, "running")
    with ledger.held(one.key) as free:
        assert free
        ledger.write(one)
        assert ledger.read(one.key).status == "running"  # type: ignore[union-attr]
        with ledger.held(one.key) as twice:
            assert not twice
    assert ledger.read(one.key).status == "killed"  # type: ignore[union-attr]
    (tmp_path / "ledger" / f"{one.key}.json").write_text("{")
    with pytest.raises(UserError, match="Remove it"):
        ledger.read(one.key)


@pytest.mark.parametrize(
    ("outcome", "closing", "status"),
    [
        (Outcome(0, 1.0), False, "done"),
        (Outcome(2, kind="diverged", said="x"), False, "diverged"),
        (Outcome(2, kind="mistake", said="x"), False, "failed"),
        (Outcome(1, kind="crash", said="x"), False, "failed"),
        (Outcome(1, kind="killed"), False, "killed"),
        (Outcome(1, kind="killed"), True, "stopped"),
        (Outcome(75, kind="interrupted"), True, "stopped"),
    ],
)
def test_what_an_outcome_is_called(tmp_path: Path, outcome: Outcome, closing: bool, status: str) -> None:
    one = entry("0.1", 1, None, "running")
    one.run_dir = str(tmp_path)
    pool.record(one, outcome, 2.0, closing)
    assert one.status == status
    assert one.seconds == 2.0


def test_a_job_that_cannot_be_started_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for its plan in /tmp, say: it is failed, and the next one runs in its slot."""
    ledger = Ledger(tmp_path)
    ledger.path.mkdir(parents=True, exist_ok=True)
    entries = [Entry(f"k{n}", [], {"n": str(n)}, 1, str(tmp_path / f"run{n}")) for n in range(2)]
    started: list[str] = []

    class Broken:
        processes: tuple[Any, ...] = ()
        signals: tuple[int, ...] = ()

        def __init__(self, plan: Any, count: int, variables: Any = None, output: Any = None) -> None:
            if not started:
                started.append("failed")
                raise OSError(28, "No space left on device")
            started.append("went")

        def running(self) -> bool:
            return False

        def outcome(self) -> Outcome:
            return Outcome(0, 1.0)

        def close(self) -> None:
            pass

    monkeypatch.setattr(pool, "Ranks", Broken)
    monkeypatch.setattr(pool, "device_count", lambda plan: 1)
    waiting = iter([pool.Job(entry, SimpleNamespace()) for entry in entries])
    done: list[Entry] = []
    board = pool.Board(lambda: entries, 2, "val/loss")
    pool.Pool([pool.Slot()], ledger, "continue", board).run(lambda: next(waiting, None), done.append)
    assert started == ["failed", "went"]
    assert [e.status for e in done] == ["failed", "done"]
    assert "could not be started: [Errno 28] No space left" in done[0].said
    assert ledger.read("k0").status == "failed"


@pytest.mark.parametrize("content", [None, "", '{"metric": '])
def test_a_job_whose_last_word_is_lost_takes_nothing_with_it(tmp_path: Path, content: str | None) -> None:
    """A full disk for temporary files, or a kill while it is written."""
    ranks = object.__new__(Ranks)
    ranks._result_file = tmp_path / "result.json"
    ranks.processes = [subprocess.Popen([sys.executable, "-c", ""])]
    ranks.processes[0].wait()
    if content is not None:
        ranks._result_file.write_text(content)
    assert ranks.outcome() == Outcome(0, None)


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    cpu = plan(*TINY)
    assert [s.cores for s in pool.slots_for(cpu, "auto", None)] == [frozenset({n}) for n in range(8)]
    assert [len(s.cores) for s in pool.slots_for(cpu, "auto", 3)] == [2, 2, 2]
    assert pool.slots_for(cpu, 1, None) == [pool.Slot()]
    assert len(pool.slots_for(plan(*TINY, "trainer=ddp_sim", "trainer.devices=4"), "auto", None)) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    gpu = SimpleNamespace(config=plan(*TINY, "trainer=gpu", "trainer.devices=2").config)
    made = pool.slots_for(gpu, "auto", None)  # type: ignore[arg-type]
    assert [s.environment for s in made] == [{"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    with pytest.raises(UserError, match="2 at most"):
        pool.slots_for(gpu, 3, None)  # type: ignore[arg-type]


def test_the_live_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = [entry("0.1", 1, 2.5), entry("0.2", 1, None, "running"), entry("0.3", 1, None, "waiting")]
    known += [entry("0.4", 1, None, "diverged")]
    known[1].run_dir = str(tmp_path)
    (tmp_path / ".progress.json").write_text('{"step": 3, "of": 6, "val/loss": 4.25}')
    board = pool.Board(lambda: known, 5, "val/loss")
    board.console = Console(force_terminal=True, width=120, highlight=False)
    looked = []

    def look() -> None:
        known[2].status, known[2].metrics = "done", {"val/loss": 1.125, "steps": 6.0}
        looked.append(1)

    with board.watching(look):
        deadline = time.monotonic() + 20
        while not looked and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
    board.say(known[3])
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    for text in ("5 jobs: 2 done, 1 running, 1 diverged", "optimizer.lr=0.2", "3/6", "4.25", "1.125", "val/loss"):
        assert text in shown, shown
    assert "[3/5] optimizer.lr=0.4, seed=1: diverged" in shown
