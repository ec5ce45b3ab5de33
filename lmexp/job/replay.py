"""Runs the step again at which a run went wrong, from the checkpoint before it, on the same samples."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lmexp.callback.guard import Guard, Rollback, texts_of
from lmexp.contracts import IGNORE_INDEX, Batch, ReadsWholeTexts, UserError
from lmexp.job.check import check
from lmexp.job.launch import set_matmul_precision
from lmexp.job.plan import Plan
from lmexp.job.restore import refuse_foreign_parts
from lmexp.job.train import quiet_libraries, train_in
from lmexp.optimizer.sharding import norm_of
from lmexp.run.directory import RunDirectory, disk_errors, write_json
from lmexp.run.pieces import pieces_of
from lmexp.run.terminal import Terminal
from lmexp.task.base import BaseTask, split_batch


class _Reached(Exception):
    """The step has been looked at."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__("reached")
        self.report = report


def replay(plan: Plan) -> float:
    """Replay the step of a flight record; prints what is wrong in it, returns the gradient norm that it finds.

    Raises `UserError` if there is no record, or if the checkpoint before it is gone.
    """
    quiet_libraries()
    if plan.config.trainer.devices != 1:
        raise UserError("job=replay runs in one process; leave trainer.devices at 1.")
    record_file = _record_file(plan)
    record: dict[str, Any] = json.loads(record_file.read_text(encoding="utf-8"))
    saved = OmegaConf.load(record_file.parent.parent / "config.yaml")
    assert isinstance(saved, DictConfig)
    terminal = Terminal()
    terminal.print(f"Step {record['step'] + 1}: {escape(record['why'])}. Going there from {record['checkpoint']}.")
    with tempfile.TemporaryDirectory(prefix="lmexp-replay-") as name:
        directory = RunDirectory(Path(name, "run"))
        directory.checkpoints.mkdir(parents=True)
        if record["checkpoint"] is not None:
            source = record_file.parent / record["checkpoint"]
            if not source.exists():
                raise UserError(f"{source} is gone; the step can be reached from this checkpoint only.")
            for file in (*pieces_of(source), source):
                shutil.copy2(file, directory.checkpoints)
        cfg = _configured(plan, saved, directory)
        set_matmul_precision(cfg.trainer.matmul_precision)
        report = _run_to(record, cfg, plan, directory)
    _show(report, terminal)
    if plan.config.out is not None:
        with disk_errors(plan.config.out, "Writing out="):
            write_json(Path(plan.config.out), report)
    return float(report["grad_norm"])


def _record_file(plan: Plan) -> Path:
    if plan.config.job.record is not None:
        path = Path(plan.config.job.record)
        if not path.is_file():
            raise UserError(f"job.record={path} does not exist; expected a file of a run's flight/.")
        return path
    if plan.config.ckpt is None:
        raise UserError("job=replay needs a run: ckpt=RUN_DIRECTORY, or job.record=FILE of its flight/.")
    flight = RunDirectory(Path(plan.config.ckpt)).flight
    records = sorted(p for p in flight.glob("step-*.json") if ".rank" not in p.name)
    if not records:
        raise UserError(
            f"ckpt={plan.config.ckpt}: {flight} holds no record. (On GPUs, with callback.guard.policy=raise and no "
            "spike or loss_spike, bad steps are found too late for one; go on with resume=auto "
            "callback.guard.policy=skip to get it.)"
        )
    return records[-1]


def _configured(plan: Plan, saved: DictConfig, directory: RunDirectory) -> DictConfig:
    plain: Any = OmegaConf.to_container(saved)
    refuse_foreign_parts(plain)
    cfg = OmegaConf.create(plain)
    cfg.trainer = plan.config.trainer.copy()
    asked = {override.lstrip("+~").partition("=")[0] for override in plan.overrides}
    for key, before in (("precision", "auto"), ("matmul_precision", "highest")):  # as it ran, unless asked otherwise
        if not asked & {"trainer", f"trainer.{key}"}:
            cfg.trainer[key] = saved.trainer.get(key, before)
    cfg.callback.checkpoint.sharded = False  # read it is in any case
    cfg.paths = OmegaConf.merge(cfg.paths, {"run_dir": str(directory.path)})
    cfg.resume = "auto"
    cfg.callback.guard.policy = cfg.callback.guard.policy.replace("rollback", "raise")
    for quiet in ("samples", "progress"):
        cfg.callback.pop(quiet, None)
    cfg.sweep = OmegaConf.merge(plan.config.sweep, {})
    OmegaConf.set_readonly(cfg, True)
    return cfg


def _run_to(record: dict[str, Any], cfg: DictConfig, plan: Plan, directory: RunDirectory) -> dict[str, Any]:
    parts = check(cfg, 1)
    guard = next(c for c in parts.callbacks if isinstance(c, Guard))

    def watched(batch: Batch, task: BaseTask, step: int, trainer: Any) -> None:
        if step == record["step"]:
            raise _Reached(_looked_at(batch, task, step, trainer.datamodule))

    guard.watched = watched
    first = record.get("from_sample", 0)  # records of before have what was passed over
    if record.get("passed_over") and cfg.batch_size is not None:
        start = record["checkpoint"]
        saved_at = 0 if start is None else int(start.split("-")[1].split(".")[0])
        first = saved_at * cfg.batch_size + record["passed_over"]
    backs = [Rollback(record["step"], first, "")] if first else []
    own = Plan(cfg, plan.choices | {"job": "train"}, [], plan.in_sweep)
    try:
        train_in(own, parts, directory, Terminal(quiet=True), 0, 1, backs)
    except _Reached as reached:
        return reached.report
    raise UserError(f"Step {record['step'] + 1} was not reached: the run ends before it, by its configuration.")


@torch.no_grad()
def _looked_at(batch: Batch, task: BaseTask, step: int, data: Any) -> dict[str, Any]:
    """What the step consists of: its samples one by one, the first module that goes wrong, the layers."""
    first, last = data.span
    found: Iterable[tuple[int, Batch]] = enumerate(split_batch(batch, 1), first)
    if isinstance(data.objective, ReadsWholeTexts):  # several share a row
        found = data.one_by_one(range(first, last + 1))
    samples: list[dict[str, Any]] = []
    worst: tuple[float, Batch] | None = None
    for number, here in found:
        row = task.transfer_batch_to_device(here, task.device, 0)
        count = int((row["labels"] != IGNORE_INDEX).sum())
        loss = task.loss_sum(row).item() / max(1, count)
        samples.append(
            {"sample": number, "loss": loss, "tokens": count, "text": "".join(texts_of(row, data.tokenizer))}
        )
        if worst is None or _badness(loss) > worst[0]:
            worst = _badness(loss), row
    assert worst is not None
    samples.sort(key=lambda s: -_badness(s["loss"]))
    place = _first_wrong(task, worst[1])
    gradients = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    total = (batch["labels"] != IGNORE_INDEX).sum().item()
    return {
        "step": step,
        "grad_norm": norm_of(list(gradients.values())).item() / total,
        "samples": samples,
        "first_not_finite": place,
        "layers": {
            name: {"weight_norm": norm_of([p]).item(), "grad_norm": norm_of([gradients[name]]).item() / total}
            for name, p in task.model.named_parameters()
            if name in gradients
        },
    }


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _first_wrong(task: BaseTask, row: Batch) -> str | None:
    """The first module whose output is not finite, or None."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return look

    leaves = [(n, m) for n, m in task.model.named_modules() if not any(True for _ in m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        task.loss_sum(row)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    table = Table(title="Samples of the step, the worst first", title_justify="left")
    table.add_column("sample", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("text", overflow="ellipsis", no_wrap=True)
    for sample in report["samples"][:8]:
        table.add_row(str(sample["sample"]), f"{sample['loss']:.4g}", escape(repr(sample["text"])[:120]))
    terminal.print(table)
    layers = sorted(
        report["layers"].items(), key=lambda item: (math.isfinite(item[1]["grad_norm"]), -item[1]["grad_norm"])
    )
    table = Table(title="Layers, by the norm of their gradients", title_justify="left")
    table.add_column("parameter")
    for column in ("gradient", "weight"):
        table.add_column(column, justify="right")
    for name, norms in layers[:12]:
        table.add_row(name, f"{norms['grad_norm']:.4g}", f"{norms['weight_norm']:.4g}")
    terminal.print(table)
    place = report["first_not_finite"]
    terminal.print(
        f"Norm of the whole gradient: {report['grad_norm']:.4g}. "
        + (
            f"The first output that is not finite is that of {place}."
            if place
            else "All outputs of modules are finite."
        )
    )
