"""Tell what a checkpoint makes of texts: labels with their probabilities, or what it writes for them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lmexp.callback.answers import write_for
from lmexp.callback.predictions import answer
from lmexp.contracts import IGNORE_INDEX, Sample, UserError
from lmexp.corpus.labelled import COLUMNS
from lmexp.corpus.tables import kind_of
from lmexp.data.loader import each_tensor
from lmexp.job.build import accelerator_of, precision_of
from lmexp.job.check import check_out
from lmexp.job.plan import Plan
from lmexp.job.restore import Restored, restore
from lmexp.job.train import quiet_libraries
from lmexp.objective.classification import Classification
from lmexp.objective.text_to_text import TextToText
from lmexp.run.directory import write_json_lines
from lmexp.task.classification import TextClassification


def predict(plan: Plan) -> None:
    """Print a JSON line for each text, or write them to `out`: what the row had, and `told` with `probabilities`, or
    `output`."""
    job, out = plan.config.job, plan.config.out
    if not isinstance(job.batch_size, int) or job.batch_size < 1:
        raise UserError(f"job.batch_size={job.batch_size}; expected a whole number of at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"trainer.devices={plan.config.trainer.devices}: prediction runs on one; set trainer.devices=1."
        )
    check_out(out)
    quiet_libraries()
    restored = restore(plan, 1)
    objective = restored.parts.objective
    if not isinstance(objective, (Classification, TextToText)):
        raise UserError(
            f"ckpt={plan.config.ckpt} was trained with {type(objective).__name__}, which makes nothing of a text that "
            "could be predicted; give the checkpoint of a classification or text-to-text run, or use job=generate."
        )
    n_texts: int = getattr(restored.parts.data.corpus, "n_texts", 1) if isinstance(objective, Classification) else 1
    rows = read_rows(job.input, n_texts)
    sides = [restored.tokenizer.encode([row[name] for row in rows]) for name in COLUMNS[:n_texts]]
    tell_cut(restored, np.array([[len(text) for text in texts] for texts in zip(*sides, strict=True)]))
    done: list[dict[str, Any]] = []
    for first in range(0, len(rows), job.batch_size):
        here = slice(first, first + job.batch_size)
        batch, encoded = rows[here], [side[here] for side in sides]
        for row, told in zip(batch, _told(restored, encoded, first), strict=True):
            done.append({**row, **told})
            if out is None:
                print(json.dumps(done[-1], ensure_ascii=False), flush=True)
    if out is not None:
        write_json_lines(Path(out), done)
        print(f"Written to {out}.", file=sys.stderr)


def read_rows(source: str | None, n_texts: int) -> list[dict[str, Any]]:
    """The rows of a file, or of standard input (-), each with `text`, and `text2` where two are read: JSON lines where
    the name ends in .jsonl or .ndjson, else a text on each line, and the second after a tab."""
    if source is None:
        raise UserError(
            "job.input is not given; expected a file with a text on each line, or JSON lines (.jsonl) with `text`, or "
            "- for standard input: job.input=FILE."
        )
    if kind_of(Path(source)) not in (None, "jsonl"):
        raise UserError(
            f"job.input={source} is a table; expected a text on each line, or JSON lines (.jsonl) with `text`. To "
            "score a table with labels use job=evaluate data=labelled_files job.predictions=FILE."
        )
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"job.input={source} cannot be read: {error}. Give a text file in UTF-8.") from error
    is_json = Path(source).suffix in (".jsonl", ".ndjson")
    rows, broken = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line) if is_json else dict(zip(COLUMNS, line.rstrip("\r").split("\t", n_texts - 1), strict=False))
        if row is None or not all(isinstance(row.get(name), str) for name in COLUMNS[:n_texts]):
            broken.append(str(number))
        else:
            rows.append(row)
    wanted = " and ".join(COLUMNS[:n_texts])
    if broken:
        shape = f"an object with {wanted}" if is_json else f"{n_texts} texts with a tab between"
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise UserError(f"job.input={source}, line {', '.join(broken[:10])}{more}: expected {shape} on each line.")
    if not rows:
        raise UserError(f"job.input={source} holds no text; expected {wanted} on each line.")
    return rows


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@torch.inference_mode()
def _told(restored: Restored, encoded: Sequence[Sequence[np.ndarray]], first: int) -> Iterator[dict[str, Any]]:
    """What is to be added to each row, whose first texts, and second ones, are tokens; it begins with row `first`."""
    device = torch.device(accelerator_of(restored.cfg))
    restored.task.to(device).eval()
    half = precision_of(restored.cfg) != "32-true"
    context = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    data, parts = restored.parts.data, restored.parts
    with context:
        if isinstance(parts.objective, TextToText):
            ids = write_for(
                restored.task.model,
                encoded[0],
                parts.objective,
                data.block_size,
                restored.tokenizer,
                parts.sampling,
                len(encoded[0]),
                first,
            )
            return iter([{"output": restored.tokenizer.decode(row, skip_special=True).strip()} for row in ids])
        task = cast(TextClassification, restored.task)
        metric = task.metric
        label = np.zeros(len(metric.classes) if metric.multilabel else (), dtype=np.int64)
        samples = [_sample([side[i] for side in encoded], i, label) for i in range(len(encoded[0]))]
        start = getattr(parts.model, "decoder_start_id", None)
        batch = parts.objective.collate(restored.tokenizer, parts.model.family, start)(samples, data.block_size, 0)
        logits = task.logits(each_tensor(batch, lambda tensor: tensor.to(device))).flatten(0, 1).cpu()
    labels = batch["labels"].flatten(0, 1)
    there = labels[:, 0] != IGNORE_INDEX if metric.multilabel else labels != IGNORE_INDEX
    probabilities = logits.sigmoid() if metric.multilabel else logits.softmax(-1)
    order = batch["places"].flatten()[there].argsort()
    return (answer(row, metric.classes, metric.multilabel) for row in probabilities[there][order].tolist())


def tell_cut(restored: Restored, lengths: np.ndarray) -> None:
    """Say how many of texts with `lengths` (n, texts) tokens are too long to be read whole, if some are."""
    parts = restored.parts
    lost = parts.objective.lost(lengths, parts.data.block_size, parts.model.family)[:, 0]  # type: ignore[attr-defined]
    if lost.any():
        print(f"{(lost > 0).sum()} of {len(lost)} texts are longer than the model reads, and cut.", file=sys.stderr)


def _sample(texts: Sequence[np.ndarray], index: int, label: np.ndarray) -> Sample:
    first, *more = (Sample(t.astype(np.int64), np.zeros(len(t), np.float32), index, label=label) for t in texts)
    return Sample(first.tokens, first.n_bytes, index, label=label, pair=more[0] if more else None)
