"""What a training step costs beside the arithmetic, at nanoGPT's CPU shape and at the default experiment's.

    python benchmarks/overhead.py --nanogpt CHECKOUT --text tinyshakespeare.txt [--pairs 4] [--steps 200]

1. lmexp, default logging on, against a bare loop over the same model, optimizer and batches.
2. lmexp with a GPT, plain AdamW and batch 12 against nanoGPT's loop at that shape.
3. The same against the Hugging Face Trainer with GPT-2 of that shape.

The bare loop runs in the same process, a few steps of each in turn; the others as whole processes in turn and in both
orders, each timing its own steps after the first tenth.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from measure import ROOT, head, median, nanogpt_data, ours, run, table
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(ROOT))
from lmexp.contracts import IGNORE_INDEX

BATCH, BLOCK = 12, 64
BLOCK_STEPS = 10
SHAPE = {"n_layers": 4, "n_heads": 4, "d_model": 128}


class Beside(Callback):
    """After every `BLOCK_STEPS` steps of a run, as many of the plainest loop over the same model and batches.

    Both sides so work in one process and within a second of one another: the machine's moods fall on both.
    """

    latest: Beside

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []
        type(self).latest = self

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.model = copy.deepcopy(pl_module.model)
        self.optimizer = pl_module.build_optimizer(self.model)
        self.batches = iter(trainer.datamodule.train_dataloader())
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % BLOCK_STEPS:
            return
        ours_took = time.perf_counter() - self.mark
        start = time.perf_counter()
        for i in range(step - BLOCK_STEPS, step):
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * pl_module.schedule(i, pl_module.max_steps)
            batch = next(self.batches)
            hidden = self.model(**batch["inputs"]).flatten(0, 1)
            scored = (batch["labels"] != IGNORE_INDEX).sum()
            loss = self.model.head.loss(hidden, batch["labels"].flatten()) / scored
            loss.backward()
            clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.pairs.append((ours_took, time.perf_counter() - start))
        self.mark = time.perf_counter()


def bare(overrides: list[str]) -> tuple[float, float]:
    """Milliseconds a step of lmexp, and of the bare loop beside it: medians of blocks, the first left out."""
    import overhead

    from lmexp.job.train import train as job
    from tests.runs import plan

    with tempfile.TemporaryDirectory() as folder:
        job(plan(*overrides, f"paths.run_dir={folder}/run", "+callback.beside._target_=overhead.Beside"))
    pairs = overhead.Beside.latest.pairs[1:]
    ratio, theirs = median([a / b for a, b in pairs]), median([b for _, b in pairs])
    return 1000 * ratio * theirs / BLOCK_STEPS, 1000 * theirs / BLOCK_STEPS


def trainer(steps: int) -> float:
    """Milliseconds a step of the Hugging Face Trainer with GPT-2 of that shape, its defaults and no dropout."""
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


def nanogpt(copied: Path, steps: int) -> float:
    """Milliseconds a step of nanoGPT's loop, as it prints them."""
    done = run(
        [
            *(sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"),
            *("--eval_iters=1", "--eval_interval=1000000", "--log_interval=1", f"--block_size={BLOCK}"),
            *(f"--batch_size={BATCH}", "--n_layer=4", "--n_head=4", "--n_embd=128", f"--max_iters={steps}"),
            "--dropout=0.0",
        ],
        cwd=copied,
    )
    times = [float(m[1]) for _, line in done.lines if (m := re.search(r"^iter \d+: .*time ([\d.]+)ms", line))]
    times = times[steps // 10 :]
    return sum(times) / len(times)


def side(name: str, overrides: list[str], steps: int) -> list[float]:
    """A process of its own: milliseconds a step, of lmexp and the bare loop beside it, or of the Trainer."""
    done = run([sys.executable, __file__, "--side", name, "--steps", str(steps), *overrides])
    return json.loads(done.lines[-1][1])


def hf(steps: int) -> float:
    """Milliseconds a step of the Hugging Face Trainer, in a process of its own."""
    return side("trainer", [], steps)[0]


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
        print(json.dumps(bare(options.overrides) if options.side == "bare" else [trainer(options.steps)]))
        return
    if options.nanogpt is None or options.text is None:
        parser.error("--nanogpt and --text are needed")
    if options.pairs < 2 or options.pairs % 2:
        parser.error("--pairs must be even: each side goes first as often as the other")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied = nanogpt_data(options.nanogpt.resolve(), folder, options.text.read_text(encoding="utf-8"))
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

                if other == "bare":
                    a, b = side("bare", [*overrides, *timing], steps)
                else:
                    sides: dict[str, Callable[[], float]] = {
                        "mine": partial(mine, folder / f"run{count}", [*overrides, *timing]),
                        "theirs": partial(nanogpt, copied, steps) if other == "nanogpt" else partial(hf, steps),
                    }
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
        f"\n{options.pairs} runs of each side. Against the bare loop: both in one process, {BLOCK_STEPS} steps each\n"
        "in turn, the median of the ratios of neighbouring blocks. Against the others: whole processes in turn.\n"
        "Times are medians; ratios the geometric mean of two runs (in both orders), of these the median and the range."
    )


if __name__ == "__main__":
    main()
