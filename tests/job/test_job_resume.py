"""Whatever stops a run, going on gives the run that was never stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import TINY, assert_same, checkpoint, command, corpus, run, scalars

EXACT = ("state_dict", "optimizer_states", "TextData", "average")
STEPS = 60
KILLS = {1: 10, 2: 4}
"""Processes -> how often a run is killed."""


def arguments(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [
        *TINY,
        corpus(folder),
        f"paths.cache_dir={folder / 'cache'}",
        f"max_steps={steps}",
        "validate_every=15",
        "log_every=4",
        "callback.checkpoint.every_steps=7",
        "model=gpt",
        "model.dropout=0.1",  # so that the random state matters
        "callback.average.decay=0.9",
        *list(more),
    ]


def compare(whole: Path, parts: Path, steps: int = STEPS) -> None:
    a, b = checkpoint(whole), checkpoint(parts)
    for key in EXACT:
        assert_same(a[key], b[key], key)
    assert_same(a["lmexp"]["random"], b["lmexp"]["random"], "random")
    assert_same(a["lmexp"]["best"], b["lmexp"]["best"], "best")
    curves, pieces = scalars(whole), scalars(parts)
    assert [step for step, _ in pieces["train/loss"]] == list(range(1, steps + 1))
    assert [step for step, _ in pieces["val/loss"]] == list(range(15, steps + 1, 15))
    for tag in ("train/loss", "optim/grad_norm", "val/loss", "val/bits_per_byte"):
        assert curves[tag] == pieces[tag], tag


def start(args: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(*args), **quiet, env=environment, start_new_session=True)


def steps_saved(folder: Path) -> int:
    files = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    return int(files[-1].stem.split("-")[1]) if files else 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_random_moments(tmp_path: Path, devices: int) -> None:
    trainer = ["trainer=ddp_sim"] if devices == 2 else []
    steps = 90 * KILLS[devices]  # long enough that no life gets to the end
    args = arguments(tmp_path, *trainer, steps=steps)
    whole = run(*args, f"paths.run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    parts = tmp_path / "parts"
    args += [f"paths.run_dir={parts}", "resume=auto"]
    moments = random.Random(devices)
    to_first = 0.0  # seconds from a start to its first checkpoint
    for kill in range(KILLS[devices]):
        before = steps_saved(parts)
        process = start(args)
        if kill % 4 == 3:  # some moment of starting, going on or the first steps
            time.sleep(moments.random() * 1.2 * to_first)
        else:  # from when training is under way: the first checkpoint of this life, then some moment after it
            begun = time.monotonic()
            while process.poll() is None and steps_saved(parts) == before:
                time.sleep(0.002)
            to_first = time.monotonic() - begun
            time.sleep(moments.random() * 0.15)
        assert process.poll() is None, "the run came to its end, or failed, before it was killed"
        process.kill()
        process.wait()
    time.sleep(1)  # ranks follow the process that launched them
    done = run(*args)
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "whole", parts, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGUSR1)],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, devices: int, number: int) -> None:
    trainer = ["trainer=ddp_sim"] if devices == 2 else []
    args = arguments(tmp_path, *trainer)
    whole = run(*args, f"paths.run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    parts = tmp_path / "parts"
    args += [f"paths.run_dir={parts}", "resume=auto"]
    process = start(args)
    while process.poll() is None and steps_saved(parts) == 0:
        time.sleep(0.002)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does: to all that the terminal started
    else:
        process.send_signal(number)
    assert process.wait() == 75
    assert 0 < steps_saved(parts) < STEPS
    assert not (parts / "metrics.json").exists()
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    compare(tmp_path / "whole", parts)


def threads_of(pid: int) -> list[str]:
    """The states of a process's threads; a zombie alone once it has ended."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            found.append(thread.read_text().rpartition(")")[2].split()[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "seen_late"), [(0, False), (1, False), (0, True), (1, True)])
def test_a_rank_that_dies_brings_the_others_down(tmp_path: Path, rank: int, seen_late: bool) -> None:
    args = [*arguments(tmp_path, "trainer=ddp_sim", steps=100_000), f"paths.run_dir={tmp_path / 'run'}", "resume=auto"]
    process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and steps_saved(tmp_path / "run") == 0:
        time.sleep(0.002)
    ranks = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(v.removeprefix(b"RANK=")): int(child) for v in variables if v.startswith(b"RANK=")}
    assert sorted(ranks) == [0, 1]
    if seen_late:  # the launcher looks again when the other has failed too, having lost its peer
        process.send_signal(signal.SIGSTOP)
    os.kill(ranks[rank], signal.SIGKILL)
    if seen_late:
        while threads_of(ranks[1 - rank]) != ["Z"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)  # the process group itself would wait for half an hour
    assert process.returncode == 1
    assert f"a process was ended from outside (rank {rank} by signal 9)" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    done = run(*args, f"max_steps={steps_saved(tmp_path / 'run') + 3}")
    assert done.returncode == 0, done.stderr
