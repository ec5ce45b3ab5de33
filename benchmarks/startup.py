"""Start-up times, whole processes, medians.

python benchmarks/startup.py [--runs 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import ROOT, head, median, ours, run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="runs of each command after one that does not count")
    options = parser.parse_args()
    commands = {
        "`python run.py --help`": [sys.executable, str(ROOT / "run.py"), "--help"],
        "`python run.py --cfg job experiment=pretrain`": [
            *(sys.executable, str(ROOT / "run.py")),
            *("--cfg", "job", "experiment=pretrain"),
        ],
        "`import torch`": [sys.executable, "-c", "import torch"],
        "`import torch, lightning.pytorch`": [sys.executable, "-c", "import torch, lightning.pytorch"],
    }
    rows = []
    for name, command in commands.items():
        times = [run(command).seconds for _ in range(options.runs + 1)][1:]
        rows.append((name, f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = []
        for number in range(options.runs + 1):
            done, metrics = ours(
                folder / str(number),
                *("experiment=pretrain", "max_steps=1", "data.validation_blocks=1", "callback.samples.prompts=[]"),
                f"paths.cache_dir={folder / 'cache'}",
            )
            times.append(done.seconds - metrics["seconds"])
    times = times[1:]
    rows.append(("a run, all but its training", f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"))
    print(head("Start-up"))
    print(table(("command", "seconds, median", "range"), rows))


if __name__ == "__main__":
    main()
