"""Whether pairs that share rows need to be grouped by length: padding, and the time of a training step, on Multi30k.

    python benchmarks/padding.py --multi30k FOLDER

Batches of 2048 tokens (`data.batch_tokens`) of the model and the tokenizer of `translate_multi30k`, each laid out as
lmexp does, where several pairs share a row of 64 tokens, and as others do, a pair in a row, padded to the longest of
its batch: in the order of training, or among 2048 pairs those of like length together. Forward and backward of each, in
turn; medians of the milliseconds for 1000 tokens that are no padding.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import head, table

from lmexp.contracts import IGNORE_INDEX, Batch, Sample
from lmexp.corpus.parallel_files import ParallelFiles
from lmexp.data.text import TextData
from lmexp.model.transformer import TransformerConfig
from lmexp.objective.rows import sequence_batch
from lmexp.objective.text_to_text import TextToText
from lmexp.task.base import tokens_read
from lmexp.tokenizer.bpe import BPE

TOKENS, BLOCK, POOL, BATCHES = 2048, 64, 2048, 48


def prepared(folder: Path, cache: str) -> TextData:
    files = {name: str(folder / f"train.{name}") for name in ("en", "de")}
    corpus = ParallelFiles(train=files, cache_dir=cache)
    data = TextData(corpus, cache, BLOCK, False, None, 64, 0, 1, 1, batch_tokens=TOKENS)
    data.configure(BPE(4096), TextToText(), None, 1, family="encoder_decoder")
    data.prepare()
    return data


def padded(samples: Sequence[Sample], eos_id: int) -> Batch:
    """A pair in a row, as long as the longest."""
    sources = [np.append(sample.tokens[: BLOCK - 1], eos_id) for sample in samples]
    targets = [np.append(sample.pair.tokens[: BLOCK - 1], eos_id) for sample in samples if sample.pair is not None]
    widths = [max(map(len, side)) for side in (sources, targets)]
    n = len(samples)
    return sequence_batch(sources, targets, [0.0] * n, [0] * n, eos_id, widths[0], widths[1])


def grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Batches of pairs of like length, of as many tokens as fit, in an order by lot."""
    batches: list[list[Sample]] = []
    for first in range(0, len(samples), POOL):
        used = TOKENS
        for sample in sorted(samples[first : first + POOL], key=tokens_of):
            if used + tokens_of(sample) > TOKENS:
                batches.append([])
                used = 0
            batches[-1].append(sample)
            used += tokens_of(sample)
    order = np.random.default_rng(0).permutation(len(batches))
    return [batches[i] for i in order]


def tokens_of(sample: Sample) -> int:
    assert sample.pair is not None
    return len(sample.tokens) + len(sample.pair.tokens) + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multi30k", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        data = prepared(options.multi30k, cache)
        source, recipe, eos = data._train_source(), data._recipe(1), data.tokenizer.eos_id
        in_order = data._train_indices(0, 1)
        plain = [source.samples(next(in_order)) for _ in range(BATCHES)]
        alike = grouped(source.samples(range(8 * POOL)))[:BATCHES]
    layouts: dict[str, tuple[list[list[Sample]], Callable[[list[Sample]], Batch]]] = {
        "rows shared (lmexp)": (plain, recipe),
        "rows shared, grouped by length": (alike, recipe),
        "a pair in a row": (plain, lambda samples: padded(samples, eos)),
        "a pair in a row, grouped by length": (alike, lambda samples: padded(samples, eos)),
    }
    torch.manual_seed(1)
    model: Any = TransformerConfig(3, 4, 128, max_length=BLOCK, prenorm=True, dropout=0.15).build(
        data.tokenizer.vocab_size
    )
    times: dict[str, list[float]] = {name: [] for name in layouts}
    filled: dict[str, list[float]] = {name: [] for name in layouts}
    for number in range(BATCHES):
        for name, (batches, made) in layouts.items():
            batch = made(batches[number])
            inputs = batch["inputs"]
            start = time.perf_counter()
            model.head.loss(model(**inputs).flatten(0, 1), batch["labels"].flatten()).backward()
            spent = time.perf_counter() - start
            read = int(tokens_read(batch))
            assert int((batch["labels"] != IGNORE_INDEX).sum()) < read
            filled[name].append(read / (inputs["tokens"].numel() + inputs["decoder_tokens"].numel()))
            times[name].append(1e6 * spent / read)
    rows = [
        (name, f"{np.mean(filled[name]):.1%}", f"{median(times[name][4:]):.1f}", f"{ratio(times, name):.2f}")
        for name in layouts
    ]
    print(head("Padding"))
    print(table(("layout", "no padding", "ms for 1000 tokens", "times lmexp's"), rows))


def ratio(times: dict[str, list[float]], name: str) -> float:
    """Median over the rounds, each of which met the same machine."""
    first = next(iter(times))
    return median(b / a for a, b in zip(times[first][4:], times[name][4:], strict=True))


if __name__ == "__main__":
    main()
