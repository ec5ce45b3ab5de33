"""From a checkpoint back to a model: what `evaluate`, `predict` and `generate` begin with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lmexp.contracts import UserError
from lmexp.job.build import Parts, build_task
from lmexp.job.check import check
from lmexp.job.plan import Plan
from lmexp.optimizer.sharding import whole_shape
from lmexp.run import checkpoint as files
from lmexp.task.base import BaseTask
from lmexp.task.sharded import load_whole
from lmexp.tokenizer.tokenizer import Tokenizer

_ASKED = ("job", "ckpt", "out", "format", "trainer", "paths", "decoding", "seed")
"""What the command line decides also where there is a checkpoint; the rest is the checkpoint's, `data` either's."""

_KEPT = ("block_size", "document_mask")
"""Keys of `data` that stay the checkpoint's when another data set is named."""


@dataclass
class Restored:
    """A checkpoint, read."""

    cfg: DictConfig
    """Its configuration, with what the command line asked for."""

    parts: Parts
    """The parts of that."""

    task: BaseTask
    """With the checkpoint's weights (their average, where it has one)."""

    tokenizer: Tokenizer
    """The one it was trained with."""

    step: int
    """The step it was saved after."""

    path: str
    """The file."""

    classes: dict[str, Any] | None = None
    """Those of a classifier, as `classes_of` gives them."""


def restore(plan: Plan, world_size: int) -> Restored:
    """Read the checkpoint that `ckpt=` names and rebuild what it holds.

    Raises `UserError` for a missing or damaged one, for one whose configuration and weights do not belong together,
    and for overrides of what a checkpoint decides.
    """
    if plan.config.ckpt is None:
        raise UserError(f"job={plan.choices['job']} needs a checkpoint: ckpt=RUN_DIRECTORY or ckpt=FILE.")
    path = files.resolve(str(plan.config.ckpt))
    checkpoint = files.load(path, whole=False)
    entry = checkpoint["lmexp"]
    cfg = merged(plan, entry["config"])
    parts = check(cfg, world_size, training=False, classes=entry.get("classes"))
    tokenizer = Tokenizer.from_json(entry["tokenizer"])
    task = build_task(cfg, parts, tokenizer.vocab_size)
    task.adapt(cfg.seed)
    load_weights(task, checkpoint, str(path))
    return Restored(cfg, parts, task, tokenizer, entry["step"], str(path), entry.get("classes"))


def merged(plan: Plan, saved: dict[str, Any]) -> DictConfig:
    """The configuration of a checkpoint with what the command line decides put in its place.

    Raises `UserError` for overrides of what the checkpoint decides, and for parts that are not of lmexp: a
    configuration that came with a file must not name just any function to be called.
    """
    cfg = OmegaConf.create(saved)
    refuse_foreign_parts(saved)
    overrides = {o.lstrip("+~").partition("=")[0]: o for o in plan.overrides}
    for key in _ASKED:
        if key != "decoding" or "decoding" in overrides:
            cfg[key] = plan.config[key]
    if "decoding" not in overrides and "seed" in overrides and "seed" in cfg.decoding:
        cfg.decoding.seed = plan.config.seed
    for key, override in overrides.items():
        top = key.split(".")[0]
        if key == "data":
            kept = {name: saved["data"][name] for name in _KEPT if f"data.{name}" not in overrides}
            cfg.data = OmegaConf.merge(plan.config.data, kept)
        elif top == "data" or (top == "decoding" and key != top):
            OmegaConf.update(cfg, key, OmegaConf.select(plan.config, key))
        elif key == "paths.cache_dir" and "data" not in overrides:
            cfg.data.cache_dir = plan.config.paths.cache_dir
            if "cache_dir" in cfg.data.corpus:
                cfg.data.corpus.cache_dir = plan.config.paths.cache_dir
        elif top == "experiment":
            print(f"{override}: the checkpoint says what it was trained as; this is left aside.", file=sys.stderr)
        elif top not in _ASKED:
            raise UserError(
                f"{override}: with ckpt= the checkpoint decides this. Leave it out; what can be set is "
                f"{', '.join(('data', *_ASKED))}."
            )
    OmegaConf.set_readonly(cfg, True)
    return cfg


def refuse_foreign_parts(saved: dict[str, Any]) -> None:
    """Raise `UserError` if a configuration that came with files names something to be called that is not lmexp's."""
    for target in _targets(saved):
        if not target.startswith("lmexp."):
            raise UserError(
                f"The checkpoint's configuration names {target}, which is no part of lmexp, and is not called."
            )


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)


def load_weights(task: BaseTask, checkpoint: dict[str, Any], path: str) -> None:
    """Put a checkpoint's weights, or their moving average, into a task; `UserError` for any misfit."""
    weights = dict(checkpoint["state_dict"]) | checkpoint.get("average", {})
    own = {name: x.shape for name, x in task.state_dict().items()}
    own |= {name: whole_shape(p) for name, p in task.named_parameters(remove_duplicate=False)}
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name])} by its configuration"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name]
    ]
    problems = [f"no {_few(missing)} in it"] * bool(missing) + [f"{_few(unknown)} not in the model"] * bool(unknown)
    problems += shapes[:3]
    if problems:
        raise UserError(
            f"Checkpoint {path} does not belong to the model of its configuration ({type(task.model).__name__}): "
            + "; ".join(problems)
            + ". Was its configuration edited? Use a checkpoint as it was saved."
        )
    load_whole(task, weights)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
