"""Time to a loss: lmexp against nanoGPT's own CPU recipe, whole processes, alternating, medians.

    python benchmarks/time_to_loss.py --nanogpt CHECKOUT --text tinyshakespeare.txt [--pairs 3]

nanoGPT runs as its README says for a CPU (4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps); the loss it
ends with is the target. lmexp's `experiment=shakespeare_char` runs at the same shape until its end, and must be at the
target or below on the whole validation split. Its loop time leaves out start-up, validation, samples and saving, as
nanoGPT's leaves out what comes before its first step.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from measure import Finished, head, median, nanogpt_data, ours, run, table

RECIPE = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]


def nanogpt_figures(done: Finished) -> tuple[float, float, float]:
    """(final validation loss, seconds of the training loop, million parameters)."""
    losses = [float(m[1]) for _, line in done.lines if (m := re.search(r"^step \d+: .*val loss ([\d.]+)", line))]
    steps = [float(m[1]) / 1000 for _, line in done.lines if (m := re.search(r"^iter \d+: .*time ([\d.]+)ms", line))]
    parameters = next(float(m[1]) for _, line in done.lines if (m := re.search(r"parameters: ([\d.]+)M", line)))
    evaluated = len(losses) - 1
    # an iteration that evaluates counts as a middling one: only training is compared
    loop = sum(sorted(steps)[: len(steps) - evaluated]) + evaluated * median(steps)
    return losses[-1], loop, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, input.txt of karpathy/char-rnn")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("overrides", nargs="*", help="overrides of experiment=shakespeare_char")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs_at = nanogpt_data(options.nanogpt.resolve(), folder, options.text.read_text(encoding="utf-8"))
        for pair in range(options.pairs):
            theirs = run([sys.executable, "train.py", *RECIPE], cwd=theirs_at)
            target, their_loop, their_size = nanogpt_figures(theirs)
            done, metrics = ours(
                folder / f"run{pair}",
                "experiment=shakespeare_char",
                f"data.corpus.path={options.text.resolve()}",
                f"paths.cache_dir={folder / f'cache{pair}'}",  # tokenized anew each time, as part of the process
                *options.overrides,
            )
            loop = metrics["speed/mean_step_ms"] * metrics["steps"] / 1000
            rows.append((target, metrics["val/loss"], theirs.seconds, done.seconds, their_loop, loop))
            print(f"pair {pair + 1}: nanoGPT {rows[-1][0::2]}, lmexp {rows[-1][1::2]}", flush=True)
    columns = list(zip(*rows, strict=True))
    wall = median([b / a for a, b in zip(columns[2], columns[3], strict=True)])
    loop = median([b / a for a, b in zip(columns[4], columns[5], strict=True)])
    print(head("Time to nanoGPT's final loss on tinyshakespeare"))
    print(
        table(
            ("", "validation loss", "whole process, s", "training loop, s"),
            (
                ("nanoGPT", *(f"{median(columns[i]):.4g}" for i in (0, 2, 4))),
                ("lmexp", *(f"{median(columns[i]):.4g}" for i in (1, 3, 5))),
                ("ratio", "", f"**{wall:.3f}**", f"**{loop:.3f}**"),
            ),
        )
    )
    print(f"\nMedians of {options.pairs} alternating pairs, ratios pair by pair. nanoGPT has {their_size} M parameters")
    print("without its position table, lmexp " + f"{metrics['parameters'] / 1e6:.3f} M.")
    if any(row[1] > row[0] for row in rows):
        sys.exit("lmexp did not reach the target in every pair")


if __name__ == "__main__":
    main()
