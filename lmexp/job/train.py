"""Train: from a plan to a run on disk."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from lmexp.callback.base import RunCallback, Scoring
from lmexp.callback.checkpoint import CheckpointFiles
from lmexp.callback.guard import Guard, Rollback
from lmexp.callback.pruning import Pruning
from lmexp.callback.samples import Samples
from lmexp.contracts import ReadsWholeTexts, UserError
from lmexp.data.report import lengths_markdown
from lmexp.data.text import TextData
from lmexp.job.build import (
    Parts,
    accelerator_of,
    bind_metric,
    build_node,
    build_task,
    build_trainer,
    classes_of,
    precision_of,
)
from lmexp.job.check import check, seconds_of
from lmexp.job.initialize import Origin, check_fit, find, initialize
from lmexp.job.plan import ADDED, Plan
from lmexp.job.restore import load_weights
from lmexp.job.search import running_trial, settings_of
from lmexp.objective.classification import Classification
from lmexp.run import checkpoint as files
from lmexp.run import environment, events
from lmexp.run.directory import RunDirectory, disk_errors, write_atomically, write_json
from lmexp.run.flops import peak_flops
from lmexp.run.session import Session
from lmexp.run.terminal import Terminal, clock
from lmexp.task.base import BaseTask

MAY_CHANGE = (
    *("trainer", "max_steps", "max_time", "resume", "paths", "log_every", "logger", "job", "ckpt", "out"),
    *("format", "init_from", "sweep", "seeds"),
    *("data.num_workers", "data.prefetch", "data.cache_dir", "callback.progress", "callback.samples", "decoding"),
    *("callback.answers.batch_size", "callback.answers.shown", "callback.answers.bootstrap"),
    *("callback.predictions", "metric.bootstrap"),
    *("callback.checkpoint.every_steps", "callback.checkpoint.every_minutes", "callback.checkpoint.keep"),
    *("callback.checkpoint.background", "callback.checkpoint.sharded"),
    "callback.guard",
    "data.corpus",  # where it lies; whether it is the same text is seen by its content
)
"""Keys that a resumed run may have otherwise: how fast, how long, where; never what is computed."""


def train(plan: Plan) -> float:
    """Run the training job; returns the final value of the metric that picks the best checkpoint."""
    cfg = plan.config
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    quiet_libraries()
    parts = check(cfg, world_size)
    directory = RunDirectory(Path(cfg.paths.run_dir))
    if rank == 0:  # the others would find what the first has begun
        directory.refuse_if_taken(cfg.resume)
    terminal = Terminal(quiet=rank > 0)
    with ExitStack() as stack:
        stack.enter_context(directory.open() if rank == 0 else nullcontext())
        stack.enter_context(directory.losses())
        stack.enter_context(disk_errors(directory.path, "Writing the run"))
        terminal.open_log(directory.log)
        stack.callback(terminal.close)
        backs: list[Rollback] = []
        while True:
            try:
                return train_in(plan, parts, directory, terminal, rank, world_size, backs)
            except Rollback as back:
                terminal.print(f"Going back to the last checkpoint, {back.why}; on with sample {back.next_sample}.")
                # without its frames, which hold the model; and all ranks after the writer of the last checkpoint
                backs.append(Rollback(back.step, back.next_sample, back.why, back.times))
            gc.unfreeze()
            gc.collect()
            if dist.is_initialized():
                dist.barrier()
            parts = check(cfg, world_size)


def train_in(
    plan: Plan,
    parts: Parts,
    directory: RunDirectory,
    terminal: Terminal,
    rank: int,
    world_size: int,
    backs: Sequence[Rollback] = (),
) -> float:
    """One go at the run; `backs`: the times that it went back before."""
    cfg = plan.config
    goes_on = cfg.resume == "auto" or bool(backs)
    found = files.last_valid(directory.checkpoints, terminal.print, tidy=rank == 0) if goes_on else None
    checkpoint_files = CheckpointFiles()
    entry: dict[str, Any] | None = None
    if found is not None:
        entry = found[1]["lmexp"]
        refuse_changes(cfg, entry["config"])
        before = entry["config"]["trainer"].get("matmul_precision", "highest")
        if before != cfg.trainer.matmul_precision:
            terminal.print(f"trainer.matmul_precision was {before} so far, and is {cfg.trainer.matmul_precision} now.")
        checkpoint_files.read[str(found[0])] = found[1]  # Lightning takes it from there, once
    path = None if found is None else found[0]
    del found
    origin: Origin | None = None
    if entry is None and cfg.init_from is not None:  # a run that goes on has its own weights
        origin = find(cfg.init_from, cfg.paths.cache_dir)
        check_fit(origin, cfg)
    data = prepare_data(cfg, parts, terminal)
    data.check_budget(world_size // cfg.trainer.tensor_parallel)
    record = {
        "config": OmegaConf.to_container(cfg),
        "tokenizer": data.tokenizer.to_json(),
        "data": data.corpus.fingerprint(),
        "classes": classes_of(data),
    }
    if entry is not None:
        _refuse_other_data(entry, record)
    task = build_task(cfg, parts, data.tokenizer.vocab_size)
    if origin is not None:
        initialize(task.model, origin, data.tokenizer, terminal.print)
        del origin  # it holds the weights
    if backs:
        data.from_sample = data.samples_seen = backs[-1].next_sample
    task.adapt(cfg.seed)
    # weights are equal on all ranks, dropout is where they read the same
    seed_all(cfg.seed + rank // cfg.trainer.tensor_parallel)
    session = _session(plan, parts, data, task, directory, terminal, record, world_size)
    if cfg.sweep.trial is not None and cfg.sweep.pruner is not None:
        settings = settings_of(cfg)
        pruning = Pruning(running_trial(settings) if rank == 0 else None, settings.monitors[0])
        parts.callbacks.insert(-1, pruning)  # the last one saves
    for callback in parts.callbacks:
        if isinstance(callback, RunCallback):
            callback.session = session
        if isinstance(callback, (Samples, Scoring)):
            callback.sampling = parts.sampling
        if isinstance(callback, Scoring):
            callback.data = data
        if isinstance(callback, Guard):
            callback.rolled_back = len(backs)
    logger: Any = build_node(cfg, "logger") if rank == 0 else False
    if entry is not None:
        session.steps_before, session.seconds_before = entry["step"], entry["seconds"]
        session.metrics |= entry["metrics"]
    if backs:
        session.metrics["guard/rolled_back"] = backs[-1].times
    if rank == 0:
        if goes_on:
            events.keep_until(directory.path, session.steps_before if entry is not None else -1)
        _describe(plan, session, entry is not None)
    if entry is not None and _is_done(entry, session):
        terminal.print(f"This run has its {entry['step']} steps already; nothing is left to train.")
        if rank == 0:
            files.link_last_and_best(directory.checkpoints, entry["step"], entry["best"]["step"])
            events.end_hparams(logger.experiment)
            logger.finalize("success")
        _test(cfg, parts, data, task, session, logger, world_size)
        return _finish(cfg, session, rank)

    trainer = build_trainer(cfg, world_size, parts.callbacks, checkpoint_files, logger)
    terminal.print(_summary(task, session, data, cfg, world_size))
    if path is not None:
        terminal.print(f"Going on from {path.name}, after step {session.steps_before}.")
    gc.freeze()  # what is there by now stays; looking through it again and again would cost steps their time
    trainer.fit(task, datamodule=data, ckpt_path=None if path is None else str(path), weights_only=True)
    for callback in parts.callbacks:
        if isinstance(callback, Samples) and callback.latest:
            terminal.print(f"\n[bold]A sample[/bold]\n{escape(callback.latest[0])}\n")
    session.metrics["seconds"] = session.seconds
    session.metrics["steps"] = trainer.global_step
    _test(cfg, parts, data, task, session, logger, world_size)
    return _finish(cfg, session, rank)


def _test(
    cfg: DictConfig, parts: Parts, data: TextData, task: BaseTask, session: Session, logger: Any, world_size: int
) -> None:
    """Score the test split of a task, if there is one, once, with the best checkpoint."""
    scoring = next((callback for callback in parts.callbacks if isinstance(callback, Scoring)), None)
    if scoring is None or "test" not in data.corpus.splits or session.metrics.get("pruned"):
        return
    if dist.is_initialized():
        dist.barrier()  # the first process links the checkpoints after the others have done their part
    path = files.resolve(str(session.directory.path))
    scored = files.load(path, whole=False)
    load_weights(task, scored, str(path))
    measured = measured_on(cfg, data, task, scoring, "test", None, world_size)
    values = {f"test/{name}": value for name, value in measured.items() if name != "tokens"}
    session.metrics |= values | {"test/step": scored["lmexp"]["step"]}
    if isinstance(logger, TensorBoardLogger):
        step = int(scored["lmexp"]["step"])
        for tag, value in values.items():
            logger.experiment.add_scalar(tag, value, step)
        logger.experiment.add_text("test", _page(values, scoring.signature), step)
        logger.experiment.close()
    session.terminal.print(f"Scored on test: {path}, after step {scored['lmexp']['step']}.")
    if scoring.shown:
        session.terminal.print(scoring.table())


def _page(values: Mapping[str, float], signature: str | None) -> str:
    """Scores beside half the widths of their intervals, for TensorBoard."""
    lines = ["| score | value | 95 % interval |", "|---|---:|---:|"]
    for tag, value in values.items():
        if not tag.endswith("_ci"):
            half = values.get(f"{tag}_ci")
            lines.append(f"| {tag} | {value:.4g} | {'' if half is None else f'± {half:.2g}'} |")
    return "\n".join(lines) + (f"\n\n{signature}" if signature else "")


def measured_on(
    cfg: DictConfig,
    data: TextData,
    task: Any,
    scoring: Scoring | None,
    split: str,
    max_blocks: int | None,
    world_size: int,
) -> dict[str, float]:
    """What a task measures over a split, `tokens` scored among it, and with `scoring` what that measures."""
    trainer = build_trainer(cfg, world_size, [] if scoring is None else [scoring], CheckpointFiles())
    data.trainer = trainer  # the loader shares the split out among its ranks
    if scoring is not None:
        scoring.split, scoring.most = split, max_blocks
    trainer.test(task, data.loader(split, max_blocks), verbose=False)
    measured: dict[str, float] = task.measured
    return measured | ({} if scoring is None else scoring.measured)


def _is_done(entry: dict[str, Any], session: Session) -> bool:
    out_of_time = session.max_seconds is not None and entry["seconds"] >= session.max_seconds
    return entry["step"] >= session.max_steps or out_of_time or entry.get("stopped_early", False)


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prepare_data(cfg: DictConfig, parts: Parts, terminal: Terminal, tokenizer: Any = None) -> TextData:
    """The data module, tokenized and open; `tokenizer`: that of a checkpoint, instead of the configured one."""
    start = time.perf_counter()
    data = parts.data.configure(
        tokenizer if tokenizer is not None else parts.tokenizer,
        parts.objective,
        cfg.batch_size,
        cfg.seed,
        cfg.max_samples,
        parts.model.family,
        getattr(parts.model, "decoder_start_id", None),
    )
    data.prepare(terminal.console)
    bind_metric(parts.metric, parts.objective, data, torch.from_numpy(data.tokenizer.token_bytes))
    if data.report.splits:
        terminal.print(data.report.table())
        sample = " ".join(data.report.sample.split())[:200]
        for line in cut_lines(data):
            terminal.print(line)
        terminal.print(f"Data ready in {time.perf_counter() - start:.1f} s. It reads: {escape(sample)}")
    return data


def cut_lines(data: TextData) -> list[str]:
    """What of whole texts is left out, or too long and cut, a line for each split and kind of text; none if all are
    read whole."""
    empty = [
        f"Left out, as a side of the pair is empty: {count:,} of {n:,} rows of {name} ({count / n:.1%})."
        for name, (count, n) in data.left_out().items()
    ]
    return empty + [
        f"Too long for the model and cut: {of.cut:,} of {of.texts:,} {name} ({of.cut / of.texts:.1%}), {of.lost:,} "
        "tokens lost. See data.block_size and objective.max_*."
        for name, of in data.lengths().items()
        if of.cut
    ]


def _lengths_page(data: TextData) -> list[str]:
    lengths = data.lengths()
    return [lengths_markdown(lengths)] if lengths else []


def refuse_changes(cfg: DictConfig, before: dict[str, Any]) -> None:
    """Raise `UserError` if a resumed run would compute something else than it did before."""
    old, new = ({**ADDED, **_flat(node)} for node in (before, OmegaConf.to_container(cfg)))
    scored = cfg.callback.get("answers") is not None  # then decoding decides what is best
    may_change = [free for free in MAY_CHANGE if not (scored and free == "decoding")]
    changed = [
        f"{key}: was {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in may_change)
    ]
    if changed:
        raise UserError(
            "resume=auto would go on with another computation than the run began:\n  "
            + "\n  ".join(changed)
            + "\nSet these as they were, or start a new run in another paths.run_dir. What may change: "
            + ", ".join(may_change)
            + "."
        )


def _refuse_other_data(entry: dict[str, Any], record: dict[str, Any]) -> None:
    if entry["tokenizer"] != record["tokenizer"]:
        raise UserError(
            "The tokenizer is not the one that this run began with: its training text changed. Give the run the text "
            "that it had, or start a new one in another paths.run_dir."
        )
    if entry["data"] != record["data"]:
        raise UserError(
            "The corpus is not the one that this run began with: its content changed. Give the run the text that it "
            "had, or start a new one in another paths.run_dir."
        )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else key).items()}


def _session(
    plan: Plan,
    parts: Parts,
    data: TextData,
    task: BaseTask,
    directory: RunDirectory,
    terminal: Terminal,
    record: dict[str, Any],
    world_size: int,
) -> Session:
    cfg = plan.config
    device = torch.device(accelerator_of(cfg))
    peak = peak_flops(device, bf16=precision_of(cfg) != "32-true")
    n_parameters = sum(p.numel() for p in task.model.parameters())
    hparams = {
        **{group: plan.choices[group] for group in _COMPARED},
        **({"decoding": plan.choices["decoding"]} if cfg.callback.get("answers") is not None else {}),
        **({"init_from": str(cfg.init_from)} if cfg.init_from is not None else {}),
        **({"lora.rank": task.lora.rank} if task.lora is not None else {}),
        **{key: cfg[key] for key in ("seed", "batch_size", "max_steps") if cfg[key] is not None},
        **({} if data.batch_tokens is None else {"batch_tokens": data.batch_tokens}),
        "block_size": data.block_size,
        "optimizer.lr": cfg.optimizer.lr,
        "parameters": n_parameters,
    }
    for override in plan.overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key.startswith(("paths.", "resume", "hydra.", "sweep", "seeds", "~")):
            hparams.setdefault(key, value)
    return Session(
        directory=directory,
        terminal=terminal,
        record=record,
        max_steps=cfg.max_steps,
        validate_every=cfg.validate_every,
        log_every=cfg.log_every,
        use=_use(data),
        shown=_shown(task, parts, data),
        bits=data.objective.bits,
        peak_flops=None if peak is None else peak * world_size,
        max_seconds=seconds_of(cfg.max_time),
        progress=None if cfg.sweep.dir is None or terminal.is_quiet else directory.progress,
        texts={
            "config": "".join(f"    {line}\n" for line in plan.yaml.splitlines()),
            "data": "\n\n".join([data.report.markdown(), *cut_lines(data), *_lengths_page(data)]),
            "model": _model_table(task.model),
        },
        hparams=hparams,
        metrics={"parameters": n_parameters, "parameters/trained": _trained(task)},
    )


def _use(data: TextData) -> tuple[str, str] | None:
    if isinstance(data.objective, Classification):
        return "Tell labels with it", "job=predict job.input=FILE"
    return None if data.family == "encoder" else ("Write with it", "job=generate")


_COMPARED = ("data", "tokenizer", "model", "objective", "task", "optimizer", "schedule")
"""Groups whose options HPARAMS compares."""


def _shown(task: Any, parts: Parts, data: TextData) -> tuple[str, ...]:
    scoring = [c for c in parts.callbacks if isinstance(c, Scoring)]
    splits = ["val", "test"] if scoring and "test" in data.corpus.splits else ["val"]
    names = [n for one in (task.metric, *scoring) for n in getattr(one, "names", ()) if not n.startswith("f1/")]
    found = [f"{split}/{name}" for split in splits for name in names]
    return (*found, "train/loss", "speed/tokens_per_second")


def _model_table(model: torch.nn.Module) -> str:
    rows = ["| part | module | parameters |", "|---|---|---:|"]
    for name, child in model.named_children():
        count = sum(p.numel() for p in child.parameters())
        rows.append(f"| {name} | {type(child).__name__} | {count:,} |")
    total = sum(p.numel() for p in model.parameters())
    rows.append(f"| **all** (shared ones once) | {type(model).__name__} | {total:,} |")
    return "\n".join(rows)


def _describe(plan: Plan, session: Session, resumed: bool) -> None:
    """Write config.yaml and environment.json; a resumed run adds its session to the latter."""
    write_atomically(session.directory.config, plan.yaml)
    write_atomically(session.directory.tokenizer, session.record["tokenizer"])
    now = environment.record()
    path = session.directory.environment
    if resumed and path.exists():
        content = json.loads(path.read_text())
        content.setdefault("resumed", []).append({"after_step": session.steps_before, **now})
    else:
        content = {
            **now,
            "data_fingerprint": session.record["data"],
            "tokenizer_fingerprint": environment.fingerprint(session.record["tokenizer"]),
        }
    write_json(path, content)


def _trained(task: BaseTask) -> int:
    return sum(p.numel() for p in task.model.parameters() if p.requires_grad)


def _summary(task: BaseTask, session: Session, data: TextData, cfg: DictConfig, world_size: int) -> str:
    n = sum(p.numel() for p in task.model.parameters())
    if data.batch_tokens is not None:
        steps = f"texts of together at most {data.batch_tokens:,} tokens"
    elif isinstance(data.objective, ReadsWholeTexts):
        steps = f"{cfg.batch_size} samples of at most {data.block_size} tokens a text"
    else:
        steps = f"{cfg.batch_size} x {data.block_size} tokens = {cfg.max_steps * cfg.batch_size * data.block_size:,}"
    trained = "" if _trained(task) == n else f", of which {_trained(task):,} are trained ({_trained(task) / n:.2%})"
    devices = f"{world_size} x {accelerator_of(cfg)}" if world_size > 1 else accelerator_of(cfg)
    matmul = cfg.trainer.matmul_precision
    precision = precision_of(cfg) + ("" if matmul == "highest" else f" ({matmul} in matrix products)")
    return (
        f"Model: {type(task.model).__name__}, {n:,} parameters{trained}. Training: {session.max_steps} steps of "
        f"{steps} on {devices}, {precision}.\n"
        f"Run: {session.directory.path}"
    )


def _finish(cfg: DictConfig, session: Session, rank: int) -> float:
    """metrics.json and the table of results; returns the metric that picks the best checkpoint."""
    metrics = dict(session.metrics)
    metrics.setdefault("steps", session.steps_before)
    metrics.setdefault("seconds", session.seconds_before)
    metrics["tokens"] = metrics.get("speed/tokens", 0)
    if rank == 0:
        write_json(session.directory.metrics, metrics)
        table = Table(title="Results", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for tag in sorted(metrics):
            value = metrics[tag]
            table.add_row(
                tag,
                f"{value:,.0f}"
                if tag in ("steps", "tokens", "speed/tokens", "parameters", "parameters/trained", "test/step")
                else f"{value:,.4g}",
            )
        session.terminal.print(table)
        folder, logs = session.directory.path, Path(cfg.paths.log_dir)
        logs = logs if logs in folder.parents else folder
        session.terminal.print(
            f"Done in {clock(metrics['seconds'])}. The run lies in {folder}; best and last checkpoint in "
            f"{folder / 'checkpoints'}.\nLook at it:    tensorboard --logdir {logs}"
        )
        if session.use is not None:
            session.terminal.print(f"{session.use[0]}: python run.py {session.use[1]} ckpt={folder}")
    return float(metrics.get(cfg.callback.checkpoint.monitor, float("nan")))


def quiet_libraries() -> None:
    """Lightning's greetings and tips, which are not about the user's run."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
