"""A run that is killed again and again, beside one that is not: what is left of the difference.

    python benchmarks/kills.py [--kills 50] [--terms 20] [--devices 1 2]

At random moments of a run's life (starting, going on, training, validating, saving) it gets SIGKILL, or SIGTERM, in
random order, and is started again with the same command. At the end its weights, optimizer, averaged weights, random
states and curves must be those of the run that was left alone, to the bit. Between two lives the directory is looked at
as `resume=auto` will find it: the last checkpoint must be one that loads, and never an earlier one than before.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import ROOT, head, median, table

sys.path.insert(0, str(ROOT))
from lmexp.run.checkpoint import step_file
from tests.job.test_job_resume import arguments, compare, start, steps_saved
from tests.runs import checkpoint, run


def lives(folder: Path, devices: int, kills: int, terms: int) -> tuple[str, ...]:
    """Row of the table."""
    moments = random.Random(devices)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    moments.shuffle(signals)
    steps = 45 * len(signals)  # validation comes every 15
    args = arguments(folder, *(["trainer=ddp_sim"] if devices == 2 else []), steps=steps)
    whole = run(*args, f"paths.run_dir={folder / 'whole'}")
    if whole.returncode:
        sys.exit(whole.stderr)
    parts = folder / "parts"
    args += [f"paths.run_dir={parts}", "resume=auto"]
    started = time.monotonic()
    start_up = 8.0  # seconds from a start to the first checkpoint of a life, measured as we go
    lasted: list[int] = []  # steps that each life left saved
    exits: Counter[int] = Counter()  # of SIGTERM
    early = 0
    for number in signals:
        before = steps_saved(parts)
        process = start(args)
        begun = time.monotonic()
        if moments.random() < 0.3:  # some moment of the start
            time.sleep(moments.random() * start_up)
            early += 1
        else:  # some moment after this life's first checkpoint
            while process.poll() is None and steps_saved(parts) == before:
                time.sleep(0.002)
            start_up = time.monotonic() - begun
            time.sleep(moments.random() * 0.4)
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with {process.returncode}")
        process.send_signal(number)
        code = process.wait()
        if number == signal.SIGTERM:
            exits[code] += 1
        time.sleep(0.5 if devices == 2 else 0)  # ranks follow the process that launched them
        after = steps_saved(parts)
        assert after >= before, "an earlier checkpoint than before"
        if after:
            assert checkpoint(parts, step_file(after))["global_step"] == after
            lasted.append(after - before)
    done = run(*args)
    if done.returncode:
        sys.exit(done.stderr)
    compare(folder / "whole", parts, steps)
    told = ", ".join(f"{n} with {code}" for code, n in sorted(exits.items()))
    spent = f"{time.monotonic() - started:.0f}"
    return (str(devices), str(kills), str(terms), str(early), told, f"{median(lasted):.0f}", str(steps), "equal", spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    options = parser.parse_args()
    rows = []
    for devices in options.devices:
        with tempfile.TemporaryDirectory() as name:
            rows.append(lives(Path(name), devices, options.kills, options.terms))
            print(rows[-1], flush=True)
    print(head("Killed again and again"))
    columns = ("processes", "SIGKILL", "SIGTERM", "of both while starting", "SIGTERM ended")
    print(table((*columns, "steps of a life, median", "steps", "result", "seconds"), rows))


if __name__ == "__main__":
    main()
