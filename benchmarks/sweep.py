"""Sweeps: what two slots save of the time of one, and what pruning saves of the steps.

    python benchmarks/sweep.py [--slots] [--pruning]

Without options, both. Slots: eight jobs of one core each, in one slot and in two. Pruning: the same random search of
learning rates with and without the median pruner, the same values tried by both.
"""

from __future__ import annotations

import argparse
import json
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
    command = [sys.executable, str(ROOT / "run.py"), "-m", *JOB, f"paths.cache_dir={folder.parent / 'cache'}"]
    start = time.perf_counter()
    subprocess.run([*command, f"hydra.sweep.dir={folder}", *overrides], check=True, stdout=subprocess.DEVNULL)
    spent = time.perf_counter() - start
    return spent, [json.loads(p.read_text()) for p in sorted((folder / "ledger").glob("*.json"))]


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
        *("validate_every=10", "sweep.pruner_startup=3", "sweep.pruner_warmup=20"),
    )
    rows = []
    for name, pruner in (("whole", "null"), ("median", "median")):
        spent, entries = sweep(folder / name, *search, f"sweep.pruner={pruner}")
        steps = sum(entry["metrics"].get("steps", 0) for entry in entries)
        best = min(entry["metrics"]["val/loss"] for entry in entries if entry["status"] == "done")
        pruned = sum(entry["status"] == "pruned" for entry in entries)
        rows.append((name, f"{steps:.0f}", str(pruned), f"{best:.4f}", f"{spent:.0f}"))
    saved = 1 - float(rows[1][1]) / float(rows[0][1])
    print(head("Pruning a search of 12 learning rates"))
    print(table(("pruner", "steps", "trials pruned", "best validation loss", "seconds"), rows))
    print(f"\nSteps saved: **{saved:.0%}**")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", action="store_true")
    parser.add_argument("--pruning", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.slots or not options.pruning:
            slots(Path(name) / "slots")
        if options.pruning or not options.slots:
            pruning(Path(name) / "pruning")


if __name__ == "__main__":
    main()
