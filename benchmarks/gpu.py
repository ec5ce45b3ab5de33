"""Throughput, utilisation and memory on one GPU at GPT-2's 124M and 350M shapes, and nanoGPT's at the first.

    python benchmarks/gpu.py [--nanogpt CHECKOUT] [--steps 60] [--minutes 5]

bf16, context 1024, a vocabulary of 50304, AdamW, synthetic tokens (speed does not depend on what they say). Each
line is a process of its own; when the time is used up, what is left is said and left out. Without a GPU it says so and
stops.
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


def lmexp(folder: Path, model: str, batch: int, compiled: bool, steps: int) -> dict[str, float]:
    """The figures of a run."""
    corpus = folder / "text.txt"
    if not corpus.exists():
        corpus.write_bytes(np.random.default_rng(0).integers(32, 127, 2**24, dtype=np.uint8).tobytes())
    _, metrics = ours(
        folder / f"{model}-{compiled}",
        *("trainer=gpu", f"trainer.compile={str(compiled).lower()}", "trainer.precision=bf16-mixed"),
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
        plans = [(shape, compiled) for compiled in (True, False) for shape in MODELS]
        for shape, compiled in plans[:1] + [("nanoGPT", True)] * bool(options.nanogpt) + plans[1:]:
            label = f"{'nanoGPT 124M' if shape == 'nanoGPT' else f'lmexp {shape}'}{', compiled' if compiled else ''}"
            if time.monotonic() - begun > 60 * options.minutes:
                left_out.append(label)
                continue
            if shape == "nanoGPT":
                speed = nanogpt(options.nanogpt.resolve(), folder, MODELS["124M"][1], options.steps)
                rows.append((label, f"{speed:,.0f}", "", ""))
            else:
                model, batch = MODELS[shape]
                figures = lmexp(folder, model, batch, compiled, options.steps)
                cells = (f"{figures['tokens/s']:,.0f}", f"{figures['utilisation']:.1%}")
                rows.append((label, *cells, f"{figures['memory, GiB']:.1f}"))
            print(rows[-1], flush=True)
    print(head("One GPU"))
    print(table(("", "tokens/s", "utilisation", "peak memory, GiB"), rows))
    if left_out:
        print(f"\nLeft out for lack of time: {', '.join(left_out)}.")


if __name__ == "__main__":
    main()
