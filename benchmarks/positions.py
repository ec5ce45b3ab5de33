"""What it costs to find the sample at any position of a run of ten million steps.

    python benchmarks/positions.py [--steps 10000000] [--batch 64]

Blocks of a corpus of 10^10 tokens, texts of a corpus of 10^8, and the draws of a mixture whose rarest source has a
share of a millionth: a random position each time, so that nothing is at hand from the one before. All of them are
looked up five times, each time from the start: what a position takes at best is not the machine's doing.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from measure import ROOT, head, median, table

sys.path.insert(0, str(ROOT))
from lmexp.contracts import Sample
from lmexp.data.mixture import Mixed, MixtureOrder, TextOrder
from lmexp.data.order import BlockOrder


class Nothing:
    """A source of empty samples."""

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        return [Sample(np.empty(0, np.int64), np.empty(0, np.float32), index) for index in indices]


def orders() -> dict[str, Callable[[int], Any]]:
    """What finds a position, by name."""
    blocks = BlockOrder(n_tokens=10**10, length=1025, stride=1024, seed=1)
    texts = TextOrder(10**8, seed=1)
    mixed = Mixed([Nothing(), Nothing()], MixtureOrder((1 - 1e-6, 1e-6), seed=1))
    return {
        "blocks": lambda position: blocks.starts(position, 1),
        "texts": texts.number,
        "a mixture": lambda position: mixed.samples([position]),
    }


def milliseconds_of(find: Callable[[int], Any], positions: Sequence[int]) -> list[float]:
    """What each position takes."""
    find(positions[0])
    milliseconds = []
    for position in positions:
        start = time.perf_counter()
        find(position)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    positions = np.random.default_rng(0).integers(0, options.steps * options.batch, size=1000).tolist()
    rows = []
    for name, find in orders().items():
        passes = [milliseconds_of(orders()[name], positions) for _ in range(5)]
        tracemalloc.start()
        for position in positions:
            find(position)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        first = passes[0]
        told = (median(first), float(np.quantile(first, 0.99)), max(first), max(map(min, zip(*passes, strict=True))))
        rows.append((name, *(f"{value:.3f}" for value in told), f"{peak / 1024:.0f}"))
    print(head("Any position of ten million steps"))
    print(table(("of", "ms, median", "99 %", "most", "most, best of five", "KiB at most"), rows))


if __name__ == "__main__":
    main()
