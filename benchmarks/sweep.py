"""Sweeps: what two slots save of the time of one, what pruning saves of the steps, what kills do to a search.

    python benchmarks/sweep.py [--slots] [--pruning] [--killed]

Without options, all. Slots: eight jobs of one core each, in one slot and in two. Pruning: the same random search of
learning rates with and without the median pruner, the same values tried by both. Killed: a TPE search of 30 trials
whose command is killed three times (SIGKILL) and started again, beside one that is left alone, a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, head, table

JOB = (
    *("data=pydocs", "model=fast", "model.n_layers=2", "model.n_heads=2", "model.d_model=64", "data.block_size=64"),
    *("batch_size=16", "trainer=cpu", "trainer.threads=1", "callback.samples.prompts=[]", "callback.checkpoint.keep=1"),
    *("callback.inspection.layers=[]", "callback.inspection.embeddings=0"),
)


def sweep(folder: Path, *overrides: str) -> tuple[float, list[dict]]:
    """Seconds of a sweep, and the entries of its ledger."""
    start = time.perf_counter()
    subprocess.run(command_of(folder, *overrides), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, entries_of(folder)


def command_of(folder: Path, *overrides: str) -> list[str]:
    command = [sys.executable, str(ROOT / "run.py"), "-m", *JOB, f"paths.cache_dir={folder.parent / 'cache'}"]
    return [*command, f"hydra.sweep.dir={folder}", *overrides]


def entries_of(folder: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((folder / "ledger").glob("*.json"))]


def slots(folder: Path) -> None:
    grid = ("optimizer.lr=0.005,0.01,0.02,0.04", "seeds=2", "max_steps=100", "validate_every=100")
    sweep(folder / "warm", *grid[2:], "optimizer.lr=0.01", "seed=1")  # the token cache
    one, _ = sweep(folder / "one", *grid, "sweep.slots=1")
    two, entries = sweep(folder / "two", *grid, "sweep.slots=2")
    assert len(entries) == 8
    assert all(entry["status"] == "done" for entry in entries)
    print(head("Slots of a sweep"))
    print(
        table(
            ("slots", "seconds for 8 jobs"),
            [("1", f"{one:.1f}"), ("2", f"{two:.1f}"), ("ratio", f"**{two / one:.2f}**")],
        )
    )


def pruning(folder: Path) -> None:
    search = (
        *("sweep=random", "optimizer.lr=tag(log,interval(1e-4,1.0))", "sweep.trials=12", "max_steps=100"),
        # in one slot, so that what is known when a trial is judged does not depend on who was faster
        *("validate_every=10", "sweep.pruner_warmup=20", "sweep.slots=1"),
    )
    rows = []
    for name, pruner in (("whole", "null"), ("median", "median")):
        spent, entries = sweep(folder / name, *search, f"sweep.pruner={pruner}")
        steps = sum(entry["metrics"].get("steps", 0) for entry in entries)
        best = min((e for e in entries if e["status"] == "done"), key=lambda e: e["metrics"]["val/loss"])
        pruned = sum(entry["status"] == "pruned" for entry in entries)
        found = (str(best["trial"]), f"{best['metrics']['val/loss']:.4f}")
        rows.append((name, f"{steps:.0f}", str(pruned), *found, f"{spent:.0f}"))
    saved = 1 - float(rows[1][1]) / float(rows[0][1])
    print(head("Pruning a search of 12 learning rates"))
    print(table(("pruner", "steps", "trials pruned", "best trial", "its validation loss", "seconds"), rows))
    print(f"\nSteps saved: **{saved:.0%}**")


def killed(folder: Path, trials: int = 30) -> None:
    space = ("optimizer.lr=tag(log,interval(1e-4,1.0))", "model.n_layers=1,2", "model.value_layers=0,1")
    search = ("sweep=tpe", *space, f"sweep.trials={trials}", "sweep.slots=1", "max_steps=30", "validate_every=30")
    sweep(folder / "warm", "optimizer.lr=0.01", "max_steps=1")  # the token cache
    rng = random.Random(0)
    cuts = {"whole": [], "killed three times": [trials // 5, trials // 2, 4 * trials // 5]}
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    commands = [
        ["taskset", "-c", str(core), *command_of(folder / name.split()[0], *search)] for core, name in enumerate(cuts)
    ]
    whole = subprocess.Popen(commands[0], **quiet)
    for cut in cuts["killed three times"]:
        process = subprocess.Popen(commands[1], **quiet)
        while sum(entry["status"] == "done" for entry in entries_of(folder / "killed")) < cut:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(rng.random() * 6)  # any moment of a job, its end, or the next one's start
        process.kill()
        process.wait()
    subprocess.run(commands[1], check=True, **quiet)
    assert whole.wait() == 0
    rows = []
    for name in cuts:
        found = sorted(entries_of(folder / name.split()[0]), key=lambda entry: entry["trial"])
        numbers = [entry["trial"] for entry in found]
        best = min(found, key=lambda entry: entry["metrics"]["val/loss"])
        again = sum(entry["attempts"] - 1 for entry in found)
        doubled = len(numbers) - len(set(numbers))
        rows.append((name, str(len(found)), str(doubled), str(again), f"{best['metrics']['val/loss']:.4f}"))
    print(head("A search that is killed"))
    print(table(("search", "runs", "trial numbers twice", "jobs begun again", "best validation loss"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", action="store_true")
    parser.add_argument("--pruning", action="store_true")
    parser.add_argument("--killed", action="store_true")
    options = parser.parse_args()
    every = not (options.slots or options.pruning or options.killed)
    with tempfile.TemporaryDirectory() as name:
        for part, asked in ((slots, options.slots), (pruning, options.pruning), (killed, options.killed)):
            if asked or every:
                part(Path(name) / part.__name__)


if __name__ == "__main__":
    main()
