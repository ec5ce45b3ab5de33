"""What the benchmarks share: whole processes and their times, medians, nanoGPT's data, Markdown tables."""

from __future__ import annotations

import json
import os
import pickle
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Finished:
    """A process that ended well."""

    seconds: float
    """From start to end, as seen from outside."""

    lines: list[tuple[float, str]]
    """(seconds since the start, line) of its output."""


def run(command: Sequence[str], cwd: Path | None = None, **environment: str) -> Finished:
    """Run a process to its end and time it; stops the benchmark if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = [(time.perf_counter() - start, line.rstrip()) for line in process.stdout]
    code = process.wait()
    seconds = time.perf_counter() - start
    if code:
        print("\n".join(line for _, line in lines[-20:]), file=sys.stderr)
        sys.exit(f"{' '.join(command)} ended with {code}")
    return Finished(seconds, lines)


def ours(
    run_dir: Path, *overrides: str, prefix: Sequence[str] = (), **environment: str
) -> tuple[Finished, dict[str, Any]]:
    """A run of lmexp in its own process, and its metrics.json. `prefix` stands before the command."""
    command = [*prefix, sys.executable, str(ROOT / "run.py"), f"paths.run_dir={run_dir}", *overrides]
    done = run(command, cwd=run_dir.parent, **environment)
    return done, json.loads((run_dir / "metrics.json").read_text())


class Ticks(Callback):
    """Writes the time after each training step as a line of a file; for runs that `in_turn` compares."""

    def __init__(self, file: str) -> None:
        self.file = Path(file).open("w", buffering=1)  # noqa: SIM115 - open as long as the process

    def tick(self) -> None:
        self.file.write(f"{time.monotonic()}\n")

    def on_train_batch_end(self, *arguments: Any, **keywords: Any) -> None:
        self.tick()


def in_turn(
    commands: Sequence[Sequence[str]], files: Sequence[Path], windows: int = 12, seconds: float = 3, warm: int = 12
) -> tuple[list[float], list[float], list[float]]:
    """Two processes that write `Ticks` run by turns, a few seconds each, while the other is stopped, so that both meet
    the same machine however it drifts.

    Returns median milliseconds of a step in each window of the first, of the second, and of each pair of neighbouring
    windows the second's to the first's. Both are killed at the end; they must have steps enough.
    """
    here = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}  # ours finds `Ticks` there
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, file in zip(commands, files, strict=True):
            with file.with_suffix(".log").open("wb") as log:
                processes.append(subprocess.Popen(list(command), stdout=log, stderr=subprocess.STDOUT, env=here))
            while not file.exists() or len(file.read_text().splitlines()) < warm:
                if processes[-1].poll() is not None:
                    sys.exit(f"{' '.join(command)} ended early:\n{file.with_suffix('.log').read_text()[-2000:]}")
                time.sleep(0.2)
            processes[-1].send_signal(signal.SIGSTOP)
        spans: list[tuple[float, float]] = []
        for window in range(2 * windows):
            process = processes[window % 2]
            process.send_signal(signal.SIGCONT)
            start = time.monotonic()
            time.sleep(seconds)
            process.send_signal(signal.SIGSTOP)
            spans.append((start, time.monotonic()))
        if any(process.poll() is not None for process in processes):
            sys.exit("a process ended before the comparison did; give it more steps")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ticks = [np.array([float(line) for line in file.read_text().split()]) for file in files]
    steps = []
    for window, (start, end) in enumerate(spans):
        inside = ticks[window % 2][(ticks[window % 2] > start) & (ticks[window % 2] < end)]
        steps.append(1000 * float(np.median(np.diff(inside))))
    first, second = steps[::2], steps[1::2]
    return first, second, [b / a for a, b in zip(first, second, strict=True)]


def nanogpt_data(checkout: Path, folder: Path, text: str) -> Path:
    """A copy of a nanoGPT checkout whose data set `shakespeare_char` is this text, as its prepare.py makes it:
    characters sorted, 90 % to train on, uint16."""
    copy = folder / "nanoGPT"
    if not copy.exists():
        subprocess.run(["cp", "-r", str(checkout), str(copy)], check=True)
    characters = sorted(set(text))
    ids = {character: number for number, character in enumerate(characters)}
    data = np.array([ids[character] for character in text], dtype=np.uint16)
    cut = int(len(data) * 0.9)
    out = copy / "data" / "shakespeare_char"
    data[:cut].tofile(out / "train.bin")
    data[cut:].tofile(out / "val.bin")
    meta = {"vocab_size": len(characters), "stoi": ids, "itos": dict(enumerate(characters))}
    (out / "meta.pkl").write_bytes(pickle.dumps(meta))
    return copy


def machine() -> str:
    """One line on where this runs."""
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {gpus}; Python {platform.python_version()}, torch {torch.__version__}"


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def head(title: str) -> str:
    """The title of a result: what, when, where, by which command."""
    command = "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"### {title}\n\n{time.strftime('%Y-%m-%d')}, {machine()}\n\n    {command}\n"
