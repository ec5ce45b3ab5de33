"""Measure a checkpoint on a split: sums over all of its tokens, whatever the devices and batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lmexp.callback.answers import Answers
from lmexp.callback.base import Scoring
from lmexp.contracts import UserError
from lmexp.data.text import TextData
from lmexp.job.build import build_node, classes_of
from lmexp.job.check import check_answers, check_out
from lmexp.job.in_context import InContext, in_context
from lmexp.job.plan import Plan
from lmexp.job.restore import Restored, restore
from lmexp.job.train import measured_on, prepare_data, quiet_libraries
from lmexp.run.directory import write_json, write_json_lines
from lmexp.run.terminal import Terminal

_OF_SPLITS = ("split", "max_blocks", "predictions")
_OF_QUESTIONS = (
    *("questions", "examples", "shots", "score", "template", "instruction", "separator", "stop", "unconditional"),
    *("batch_size", "rows"),
)
"""Keys of the job that mean something with `job.questions` only; the others, without."""


def evaluate(plan: Plan) -> float:
    """Print the metrics, write them to `out` if it is given; returns the loss in nats a token.

    With `job.questions`: what `in_context` measures.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    quiet_libraries()
    job = plan.config.job
    asked = job.questions is not None
    idle = {f"job.{key}" for key in (_OF_SPLITS if asked else _OF_QUESTIONS[1:])}
    for override in plan.overrides:
        if override.partition("=")[0] in idle:
            raise UserError(
                f"{override}: {'there is no split with' if asked else 'means nothing without'} job.questions; leave "
                f"{'one of them out' if asked else 'it out, or give job.questions=FILE'}."
            )
    if asked:
        return in_context(plan, InContext(**{key: job[key] for key in _OF_QUESTIONS}))
    if job.split not in ("train", "validation", "test"):
        raise UserError(f"job.split={job.split}; expected train, validation or test.")
    if job.max_blocks is not None and job.max_blocks < 1:
        raise UserError(f"job.max_blocks={job.max_blocks}; expected at least 1, or null for the whole split.")
    check_out(plan.config.out)
    check_out(job.predictions, "job.predictions")
    terminal = Terminal(quiet=rank > 0)
    restored = restore(plan, world_size, job.split)
    scoring = _scoring(restored.cfg)
    if isinstance(scoring, Answers):
        parts = restored.parts
        check_answers(parts.objective, parts.sampling, parts.data.block_size, parts.model.family)
    cfg = OmegaConf.merge(restored.cfg, {"max_samples": None})
    data = prepare_data(cfg, restored.parts, terminal, restored.tokenizer)  # type: ignore[arg-type]
    refuse_other_classes(restored, data)
    if scoring is not None:
        scoring.data, scoring.sampling = data, restored.parts.sampling
    elif job.predictions is not None:
        raise UserError(
            f"job.predictions={job.predictions}: {type(restored.parts.objective).__name__} tells nothing of single "
            "examples; leave it out, or give the checkpoint of a run with callback=classification or text_to_text."
        )
    measured = measured_on(restored.cfg, data, restored.task, scoring, job.split, job.max_blocks, world_size)
    values: dict[str, Any] = {f"{job.split}/{name}": value for name, value in measured.items() if name != "tokens"}
    values |= {"tokens": measured["tokens"], "steps": restored.step}
    if rank == 0:
        table = Table(title=f"{restored.path}, after step {restored.step}", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in values.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.6g}")
        terminal.print(table)
        if scoring is not None and scoring.shown:
            terminal.print(scoring.table())
        if scoring is not None and job.predictions is not None:
            write_json_lines(Path(job.predictions), scoring.records())
            terminal.print(f"Written to {job.predictions}.")
        if plan.config.out is not None:
            signature = None if scoring is None else scoring.signature
            write_json(Path(plan.config.out), values | ({"signature": signature} if signature else {}))
            terminal.print(f"Written to {plan.config.out}.")
    return float(values[f"{job.split}/loss"])


def refuse_other_classes(restored: Restored, data: TextData) -> None:
    """Raise `UserError` if the data have other classes than the checkpoint was trained on, or in another order."""
    if restored.classes is None:
        return
    ours, theirs = restored.classes["classes"], (classes_of(data) or {}).get("classes")
    if theirs != ours:
        raise UserError(
            f"{restored.path} tells {', '.join(ours)}, and the data have {', '.join(theirs or ['no classes'])}; "
            f"expected the same in the same order: data.corpus.labels=[{','.join(ours)}]."
        )


def _scoring(cfg: DictConfig) -> Scoring | None:
    """The callback of a run that looks at single examples, if it had one."""
    for name, node in cfg.callback.items():
        if node is not None and issubclass(get_class(node._target_), Scoring):
            found: Scoring = build_node(cfg, f"callback.{name}")
            return found
    return None
