"""Throughput, utilisation and memory on one GPU at GPT-2's 124M and 350M shapes, and nanoGPT's at the first.

    python benchmarks/gpu.py [--nanogpt CHECKOUT] [--steps 60] [--minutes 5]

bf16 unless it says float32, context 1024, a vocabulary of 50304, AdamW, synthetic tokens (speed does not depend on what
they say). The last lines are what the trainers for many devices cost and save on one: DDP, FSDP2 with recomputed
activations, and beside it float32 without them. Each line is a process of its own; when the time is used up, what is
left is said and left out. Without a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import head, median, ours, run, table

VOCABULARY = 50304
MODELS = {"124M": ("gpt2", 16), "350M": ("gpt2_medium", 8)}
"""Shape -> (model, sequences at once)."""

COMPILED, PLAIN = ("trainer=gpu", "trainer.compile=true"), ("trainer=gpu", "trainer.compile=false")
CASES = (
    ("lmexp 124M, compiled", "124M", COMPILED),
    ("nanoGPT 124M, compiled", None, ()),
    ("lmexp 350M, compiled", "350M", COMPILED),
    ("lmexp 124M", "124M", PLAIN),
    ("lmexp 350M", "350M", PLAIN),
    ("lmexp 124M, compiled, DDP", "124M", ("trainer=ddp", "trainer.devices=1", "trainer.compile=true")),
    ("lmexp 350M, FSDP2, recomputed", "350M", ("trainer=fsdp", "trainer.devices=1")),
    ("lmexp 350M, float32", "350M", (*PLAIN, "trainer.precision=32-true")),
)
"""(What it is, shape or None for nanoGPT, overrides)."""


def lmexp(folder: Path, run_name: str, shape: str, overrides: tuple[str, ...], steps: int) -> dict[str, float]:
    """The figures of a run."""
    model, batch = MODELS[shape]
    corpus = folder / "text.txt"
    if not corpus.exists():
        corpus.write_bytes(np.random.default_rng(0).integers(32, 127, 2**24, dtype=np.uint8).tobytes())
    _, metrics = ours(
        folder / run_name,
        *("trainer.precision=bf16-mixed", *overrides),
        *("data=files", f"data.corpus.path={corpus}", "data.corpus.by=tail", "tokenizer=byte"),
        *("data.block_size=1024", "data.num_workers=2", "data.validation_blocks=1", "data.eval_batch_size=1"),
        # bytes need 257 ids; the table and the head are as large as GPT-2's
        *(f"model={model}", f"model.vocab_multiple={VOCABULARY}", "model.bias=false", "optimizer=adamw"),
        *(f"batch_size={batch}", f"max_steps={steps}", f"validate_every={steps}", "callback.samples.prompts=[]"),
        *("callback.checkpoint.every_minutes=null", f"paths.cache_dir={folder / 'cache'}"),
    )
    return {
        "tokens/s": metrics["speed/mean_tokens_per_second"],
        "utilisation": metrics.get("speed/mfu", float("nan")),
        "memory, GiB": metrics["memory/gib"],
    }


def nanogpt(checkout: Path, folder: Path, batch: int, steps: int) -> float:
    """Tokens a second of nanoGPT's train.py, compiled, at the 124M shape."""
    copy = folder / "nanoGPT"
    run(["cp", "-r", str(checkout), str(copy)])
    data = copy / "data" / "bench"
    data.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, 50257, 2**24, dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(data / f"{split}.bin")
    done = run(
        [
            *(sys.executable, "train.py", "--dataset=bench", f"--batch_size={batch}", "--block_size=1024"),
            *("--gradient_accumulation_steps=1", "--eval_interval=1000000", "--eval_iters=1", "--log_interval=1"),
            *(f"--max_iters={steps}", "--bias=False", "--dropout=0.0", "--dtype=bfloat16"),
        ],
        cwd=copy,
    )
    times = [float(m[1]) for _, line in done.lines if (m := re.search(r"^iter \d+: .*time ([\d.]+)ms", line))]
    return batch * 1024 * 1000 / median(times[len(times) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT, to run beside")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--minutes", type=float, default=5.0, help="no run is begun after this")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py measures a CUDA GPU, and there is none here; nothing was measured.")
        return
    begun = time.monotonic()
    rows, left_out = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (label, shape, overrides) in enumerate(CASES):
            if shape is None and options.nanogpt is None:
                continue
            if time.monotonic() - begun > 60 * options.minutes:
                left_out.append(label)
                continue
            if shape is None:
                speed = nanogpt(options.nanogpt.resolve(), folder, MODELS["124M"][1], options.steps)
                rows.append((label, f"{speed:,.0f}", "", ""))
            else:
                figures = lmexp(folder, f"run{number}", shape, overrides, options.steps)
                cells = (f"{figures['tokens/s']:,.0f}", f"{figures['utilisation']:.1%}")
                rows.append((label, *cells, f"{figures['memory, GiB']:.1f}"))
            print(rows[-1], flush=True)
    print(head("One GPU"))
    print(table(("", "tokens/s", "utilisation", "peak memory, GiB"), rows))
    if left_out:
        print(f"\nLeft out for lack of time: {', '.join(left_out)}.")


if __name__ == "__main__":
    main()
