"""What a training step costs beside the arithmetic, at nanoGPT's CPU shape and at the default experiment's.

    python benchmarks/overhead.py --nanogpt CHECKOUT --text tinyshakespeare.txt [--pairs 4] [--steps 200]

1. lmexp, default logging on, against a bare loop over the same model, optimizer and batches.
2. lmexp with a GPT, plain AdamW and batch 12 against nanoGPT's loop at that shape.
3. The same against the Hugging Face Trainer with GPT-2 of that shape.

Whole processes, the sides in turn and in both orders; each side times its own steps after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measure import ROOT, head, median, nanogpt_data, ours, run, table

BATCH, BLOCK = 12, 64
SHAPE = {"n_layers": 4, "n_heads": 4, "d_model": 128}


def bare(overrides: list[str], steps: int) -> float:
    """Milliseconds a step of the plainest loop that trains the same model on the same batches."""
    sys.path.insert(0, str(ROOT))
    import torch
    from torch.nn.utils import clip_grad_norm_

    from lmexp.contracts import IGNORE_INDEX
    from lmexp.job.build import build_task
    from lmexp.job.check import check
    from lmexp.job.train import prepare_data, quiet_libraries
    from lmexp.run.terminal import Terminal
    from tests.runs import plan

    quiet_libraries()
    cfg = plan(*overrides).config
    parts = check(cfg, 1)
    data = prepare_data(cfg, parts, Terminal(quiet=True))
    task = build_task(cfg, parts, data.tokenizer.vocab_size)
    model, optimizer = task.model, task.configure_optimizers()
    batches = iter(data.train_dataloader())
    begun = 0.0
    for step in range(steps):
        if step == steps // 10:
            begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * parts.schedule(step, steps)
        batch = next(batches)
        hidden = model(**batch["inputs"]).flatten(0, 1)
        loss = model.head.loss(hidden, batch["labels"].flatten()) / (batch["labels"] != IGNORE_INDEX).sum()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    return 1000 * (time.perf_counter() - begun) / (steps - steps // 10)


def trainer(steps: int) -> float:
    """Milliseconds a step of the Hugging Face Trainer with GPT-2 of that shape, its defaults and no dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    config = GPT2Config(
        vocab_size=65,
        n_positions=BLOCK,
        n_embd=SHAPE["d_model"],
        n_layer=SHAPE["n_layers"],
        n_head=SHAPE["n_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    rows = torch.randint(65, (steps * BATCH, BLOCK))
    rows = [{"input_ids": row, "labels": row} for row in rows]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=1e-3,
        )
        Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows, callbacks=[Clock()]).train()
    first = steps // 10
    return 1000 * (times[-1] - times[first]) / (len(times) - 1 - first)


def nanogpt(copy: Path, steps: int) -> float:
    """Milliseconds a step of nanoGPT's loop, as it prints them."""
    done = run(
        [
            *(sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"),
            *("--eval_iters=1", "--eval_interval=1000000", "--log_interval=1", f"--block_size={BLOCK}"),
            *(f"--batch_size={BATCH}", "--n_layer=4", "--n_head=4", "--n_embd=128", f"--max_iters={steps}"),
            "--dropout=0.0",
        ],
        cwd=copy,
    )
    times = [float(m[1]) for _, line in done.lines if (m := re.search(r"^iter \d+: .*time ([\d.]+)ms", line))]
    times = times[steps // 10 :]
    return sum(times) / len(times)


def side(name: str, overrides: list[str], steps: int) -> float:
    """One side in a process of its own."""
    done = run([sys.executable, __file__, "--side", name, "--steps", str(steps), *overrides])
    return float(json.loads(done.lines[-1][1])["ms"])


def mine(run_dir: Path, overrides: list[str]) -> float:
    """Milliseconds a step of a run of lmexp, as it measures them."""
    _, metrics = ours(run_dir, *overrides, "data.validation_blocks=8")
    return float(metrics["speed/mean_step_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, help="tinyshakespeare, input.txt of karpathy/char-rnn")
    parser.add_argument("--pairs", type=int, default=4, help="runs of each side, an even number")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--side", choices=("bare", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        ms = bare(options.overrides, options.steps) if options.side == "bare" else trainer(options.steps)
        print(json.dumps({"ms": ms}))
        return
    if options.nanogpt is None or options.text is None:
        parser.error("--nanogpt and --text are needed")
    if options.pairs < 2 or options.pairs % 2:
        parser.error("--pairs must be even: each side goes first as often as the other")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = nanogpt_data(options.nanogpt.resolve(), folder, options.text.read_text(encoding="utf-8"))
        shape = [f"model.{key}={value}" for key, value in SHAPE.items()]
        common = [f"paths.cache_dir={folder / 'cache'}", "trainer=cpu"]
        text = [f"data.corpus.path={options.text.resolve()}", "experiment=shakespeare_char"]
        plain = [*common, *text, "model=gpt", "model.bias=false", *shape, "optimizer=adamw"]
        comparisons = {
            "bare loop, fast model and Muon, 12 x 64": ([*common, *text], "bare"),
            "bare loop, experiment=pretrain": ([*common, "experiment=pretrain"], "bare"),
            "nanoGPT's loop, GPT and AdamW, 12 x 64": (plain, "nanogpt"),
            "Hugging Face Trainer, GPT-2 and AdamW, 12 x 64": ([*plain, "model.bias=true"], "trainer"),
        }
        count = 0
        for title, (overrides, other) in comparisons.items():
            steps = options.steps if "pretrain" not in title else max(40, options.steps // 5)
            pairs = []
            for pair in range(options.pairs):
                count += 1
                timing = [f"max_steps={steps}", f"validate_every={steps}", f"log_every={max(1, min(10, steps // 10))}"]

                sides = {"mine": partial(mine, folder / f"run{count}", [*overrides, *timing])}
                if other == "nanogpt":
                    sides["theirs"] = partial(nanogpt, copy, steps)
                else:
                    sides["theirs"] = partial(side, other, [*overrides, *timing] if other == "bare" else [], steps)
                # neither side always runs first
                times = {name: sides[name]() for name in sorted(sides, reverse=bool(pair % 2))}
                a, b = times["mine"], times["theirs"]
                pairs.append((a, b))
                print(f"{title}: lmexp {a:.2f} ms, other {b:.2f} ms", flush=True)
            a, b = (median(values) for values in zip(*pairs, strict=True))
            ratios = [x / y for x, y in pairs]
            # of two processes the second is the faster or the slower by as much, whichever it is: both orders count
            both = [math.sqrt(ratios[i] * ratios[i + 1]) for i in range(0, len(ratios), 2)]
            ratio, spread = median(both), f"{min(both):.3f} to {max(both):.3f}"
            rows.append((title, f"{a:.2f}", f"{b:.2f}", f"**{ratio:.3f}**", spread, f"{1 / ratio:.3f}"))
    print(head("Cost of a training step"))
    header = ("against", "lmexp, ms", "other, ms", "ratio of times", "range", "tokens/s, lmexp to other")
    print(table(header, rows))
    print(
        f"\n{options.pairs} runs of each side. Times: medians. Ratios: the geometric mean of two pairs in both orders, of"
    )
    print("these the median and the range.")


if __name__ == "__main__":
    main()
