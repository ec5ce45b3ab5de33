"""From a checkpoint back to a model: what `evaluate`, `predict` and `generate` begin with."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lmexp.contracts import UserError
from lmexp.job.build import Parts, build_task
from lmexp.job.check import check
from lmexp.job.plan import ADDED, Plan
from lmexp.optimizer.sharding import whole_shape
from lmexp.run import checkpoint as files
from lmexp.task.base import BaseTask
from lmexp.task.sharded import load_whole
from lmexp.tokenizer.tokenizer import Tokenizer

_ASKED = ("job", "ckpt", "out", "format", "trainer", "paths", "decoding", "seed")
"""What the command line decides also where there is a checkpoint; the rest is the checkpoint's, `data` either's."""

_KEPT = ("block_size", "document_mask", "batch_tokens")
"""Keys of `data` that stay the checkpoint's when another data set is named."""


_OF_SCORING = (
    *(f"callback.answers.{key}" for key in ("batch_size", "shown", "bootstrap", "tokenize")),
    *("callback.predictions.shown", "metric.bootstrap"),
)
"""What may be asked for anew of the parts that score, which else are the checkpoint's."""

_BY_SPLIT = tuple(
    f"lmexp.corpus.{name}"
    for name in ("labelled.LabelledFiles", "labelled.LabelledHub", "parallel_files.ParallelFiles", "hub.HubTranslation")
)
"""Corpora whose splits are named one by one."""


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


def restore(plan: Plan, world_size: int, split: str | None = None) -> Restored:
    """Read the checkpoint that `ckpt=` names and rebuild what it holds; with `split`, of the corpus only that one.

    Raises `UserError` for a missing or damaged one, for one whose configuration and weights do not belong together,
    and for overrides of what a checkpoint decides.
    """
    if plan.config.ckpt is None:
        raise UserError(f"job={plan.choices['job']} needs a checkpoint: ckpt=RUN_DIRECTORY or ckpt=FILE.")
    path = files.resolve(str(plan.config.ckpt))
    checkpoint = files.load(path, whole=False)
    entry = checkpoint["lmexp"]
    cfg = merged(plan, entry["config"])
    named = split is not None and _leave_only(split, cfg, entry.get("classes"))
    parts = check(cfg, world_size, training=False, classes=entry.get("classes"))
    if named:
        parts.data.corpus.named_only = True  # type: ignore[attr-defined]
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
    for key in sorted(overrides, key=lambda key: key != "data"):  # a data set comes before its keys
        override = overrides[key]
        top = key.split(".")[0]
        if key == "data":
            old = saved["data"]
            kept = {name: old[name] for name in _KEPT if f"data.{name}" not in overrides and name in old}
            cfg.data = OmegaConf.merge(plan.config.data, kept)
        elif top == "data" or key in _OF_SCORING or (top == "decoding" and key != top):
            parent = OmegaConf.select(cfg, key.rpartition(".")[0])
            later = key in _ADDED_LATER and parent is not None
            if OmegaConf.select(cfg, key, default=_ABSENT) is _ABSENT and not later:
                raise UserError(f"{override.lstrip('+')}: {_unknown(cfg, key)}")
            OmegaConf.update(cfg, key, OmegaConf.select(plan.config, key), force_add=True)
        elif key == "paths.cache_dir" and "data" not in overrides:
            cfg.data.cache_dir = plan.config.paths.cache_dir
            if "cache_dir" in cfg.data.corpus:
                cfg.data.corpus.cache_dir = plan.config.paths.cache_dir
        elif top == "experiment":
            print(f"{override}: the checkpoint says what it was trained as; this is left aside.", file=sys.stderr)
        elif top not in _ASKED:
            raise UserError(
                f"{override.lstrip('+')}: with ckpt= the checkpoint decides this. Leave it out; what can be set is "
                f"{', '.join(('data', *_ASKED, *_OF_SCORING))}."
            )
    OmegaConf.set_readonly(cfg, True)
    return cfg


_ABSENT = object()
_ADDED_LATER = tuple(ADDED)
"""Keys that configurations of before may lack."""


def _unknown(cfg: DictConfig, key: str) -> str:
    """What is wrong with a key that the checkpoint's configuration has not."""
    parent, _, last = key.rpartition(".")
    there = OmegaConf.select(cfg, parent)
    names = sorted(there) if OmegaConf.is_dict(there) else []
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
    kind = str(OmegaConf.select(cfg, "data.corpus._target_")).rsplit(".", 1)[-1]
    of = f" (its corpus is {kind})" if key.startswith("data.") else ""
    meant = f"Did you mean {parent}.{close[0]}? " if close else ""
    has = ", ".join(n for n in names if n != "_target_") or "nothing of that name"
    return (
        f"the checkpoint's configuration has no such key{of}. {meant}{parent} has {has}; for another data set name it "
        "as well: data=OPTION."
    )


def _leave_only(split: str, cfg: DictConfig, classes: dict[str, Any] | None) -> bool:
    """Take the other splits out of the corpus, so that nothing of them needs to be there; whether its classes are now
    the checkpoint's, by their names."""
    corpus = cfg.data.corpus
    if corpus._target_ not in _BY_SPLIT:
        return False
    splits = ("train", "validation", "test")
    cut = [key for key in splits if corpus.get(f"{key}_fraction")]
    if split in cut or (split == "train" and cut):
        return False  # it is cut out of a file with the others
    given = [key for key in splits if corpus.get(key) is not None]
    if split not in given:
        there = given + cut
        raise UserError(
            f"job.split={split}: the data have no such split, only {', '.join(there) or 'none'}; set "
            + (f"job.split={there[-1]}, or " if there else "")
            + f"data.corpus.{split}=NAME."
        )
    OmegaConf.set_readonly(cfg, False)
    if "languages" in corpus and not corpus.languages and OmegaConf.is_dict(corpus.train):
        corpus.languages = list(corpus.train)  # in this order: from the first to the second
    for key in splits:
        if key != split:
            corpus[key] = None
        if f"{key}_fraction" in corpus:
            corpus[f"{key}_fraction"] = 0.0
    named = bool(classes) and "labels" in corpus and corpus.labels is None
    if classes and named:
        corpus.labels = list(classes["classes"])
    OmegaConf.set_readonly(cfg, True)
    return named


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
