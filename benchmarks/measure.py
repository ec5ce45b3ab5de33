"""What the benchmarks share: whole processes and their times, medians, nanoGPT's data, Markdown tables."""

from __future__ import annotations

import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


def ours(run_dir: Path, *overrides: str) -> tuple[Finished, dict[str, Any]]:
    """A run of lmexp in its own process, and its metrics.json."""
    done = run([sys.executable, str(ROOT / "run.py"), f"paths.run_dir={run_dir}", *overrides], cwd=run_dir.parent)
    return done, json.loads((run_dir / "metrics.json").read_text())


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
