"""Continue prompts with a checkpoint, streaming to the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmexp.callback.answers import fitted
from lmexp.contracts import UserError
from lmexp.decoding.beam import Beam, beam_search
from lmexp.decoding.generate import generate as decode
from lmexp.job.build import accelerator_of, precision_of
from lmexp.job.check import check_out
from lmexp.job.plan import Plan
from lmexp.job.predict import tell_cut
from lmexp.job.restore import Restored, restore
from lmexp.job.train import quiet_libraries
from lmexp.objective.classification import Classification
from lmexp.objective.text_to_text import TextToText
from lmexp.run.directory import write_json_lines


def generate(plan: Plan) -> None:
    """Print each continuation after its prompt, or of a text-to-text run what it writes for it, no longer than a
    target may be; `out` gets a JSON line each, with `prompt`, `sample` and `text`."""
    job = plan.config.job
    for name in ("samples", "batch_size"):
        if not isinstance(job[name], int) or job[name] < 1:
            raise UserError(f"job.{name}={job[name]}; expected a whole number of at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"trainer.devices={plan.config.trainer.devices}: generation runs on one; set trainer.devices=1."
        )
    check_out(plan.config.out)
    quiet_libraries()
    prompts = read_prompts(job.prompt, job.prompt_file)
    restored = restore(plan, 1)
    if isinstance(restored.parts.objective, Classification):
        raise UserError(
            f"ckpt={plan.config.ckpt} holds a classifier, which tells labels and doesn't write; use job=predict."
        )
    if restored.task.model.family == "encoder":
        raise UserError(
            f"ckpt={plan.config.ckpt} holds an encoder ({type(restored.task.model).__name__}), which reads and doesn't "
            "write; give the checkpoint of a decoder or an encoder-decoder."
        )
    sampling = restored.parts.sampling
    if isinstance(sampling, Beam) and job.samples > sampling.beams:
        raise UserError(
            f"job.samples={job.samples} of decoding.beams={sampling.beams}: beam search finds no more texts than that; "
            f"set decoding.beams={job.samples}."
        )
    rows: list[dict[str, Any]] = [{"prompt": p, "sample": s} for p in prompts for s in range(job.samples)]
    for first in range(0, len(rows), job.batch_size):
        _continue(
            restored,
            rows[first : first + job.batch_size],
            first,
            stream=len(rows) == 1 and not isinstance(sampling, Beam),
        )
    if plan.config.out is not None:
        write_json_lines(Path(plan.config.out), rows)
        print(f"Written to {plan.config.out}.", file=sys.stderr)


def read_prompts(prompt: Any, prompt_file: str | None) -> list[str]:
    """The prompts asked for: one text, the lines of a file, or those of standard input; else one empty prompt."""
    if prompt is not None and prompt_file is not None:
        raise UserError("job.prompt and job.prompt_file exclude each other; give one of them.")
    if prompt_file is None:
        return ["" if prompt is None else str(prompt)]
    try:
        text = sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"job.prompt_file={prompt_file} cannot be read: {error}. Give a text file in UTF-8.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        where = "standard input" if prompt_file == "-" else prompt_file
        raise UserError(f"job.prompt_file={prompt_file}: {where} holds no prompts; expected one on each line.")
    return lines


def _continue(restored: Restored, rows: list[dict[str, Any]], first: int, stream: bool) -> None:
    """Fill in `text` of each row and print it; a single one is printed as it comes."""
    tokenizer, sampling = restored.tokenizer, restored.parts.sampling
    device = torch.device(accelerator_of(restored.cfg))
    model = restored.task.model.to(device)
    ids = tokenizer.encode([row["prompt"] for row in rows])
    prompts = [[int(i) for i in row] for row in ids]
    objective = restored.parts.objective
    if isinstance(objective, TextToText):
        family, block = restored.parts.model.family, restored.parts.data.block_size
        tell_cut(restored, np.array([[len(row), 0] for row in ids]))
        sampling = fitted(sampling, objective, block, family)
        prompts = [objective.prompt(row, tokenizer, family, block).tolist() for row in ids]
    else:  # a document begins after the end of another; an encoder reads texts that end
        decoder = model.family == "decoder"
        prompts = [[tokenizer.eos_id, *row] if decoder else [*row, tokenizer.eos_id] for row in prompts]
    shown: list[int] = []
    printed = ""

    def show(row: int, token: int) -> None:
        nonlocal printed
        shown.append(token)
        text = tokenizer.decode(shown, skip_special=True)
        if not text.endswith("\ufffd"):  # perhaps the first bytes of a character: wait for the rest
            print(text[len(printed) :], end="", flush=True)
            printed = text

    # what answers a text stands below it, what continues it beside
    between = "" if model.family == "decoder" and not isinstance(objective, TextToText) else "\n"
    if stream:
        print(rows[0]["prompt"], end=between, flush=True)
    half = precision_of(restored.cfg) != "32-true"
    context = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    # eager: each new token is another shape, which a compiled model would be compiled for
    with context, torch.compiler.set_stance("force_eager"):
        ends = tokenizer.eos_id, tokenizer.vocab_size
        if isinstance(sampling, Beam):
            model.eval()
            done = list(_best(lambda kinds: beam_search(model, kinds, sampling, *ends), prompts, rows))
        else:
            numbers = range(first, first + len(prompts))
            done = decode(model, prompts, sampling, *ends, show if stream else None, numbers)
    for row, tokens in zip(rows, done, strict=True):
        row["text"] = tokenizer.decode(tokens, skip_special=True)
    if stream:
        print(rows[0]["text"][len(printed) :])
        return
    for row in rows:
        print(f"--- {row['prompt']!r}, sample {row['sample']}")
        print(row["prompt"] + between + row["text"])


def _best(search: Callable[[list[list[int]]], Any], prompts: list[list[int]], rows: list[dict[str, Any]]) -> Any:
    """The texts of rows of which several share a prompt: sample i is its i-th best; `score` is filled in."""
    kinds = list(dict.fromkeys(map(tuple, prompts)))
    found = dict(zip(kinds, search([list(kind) for kind in kinds]), strict=True))
    for row, prompt in zip(rows, prompts, strict=True):
        row["score"], tokens = found[tuple(prompt)][row["sample"]]
        yield tokens
