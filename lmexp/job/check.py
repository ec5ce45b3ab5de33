"""All that can be wrong with a configuration, found before anything slow and told at once."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from omegaconf import DictConfig

from lmexp.contracts import UserError
from lmexp.job.build import ROOT_KEYS, Parts, accelerator_of, build_node, collect, precision_of

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(max_time: Any) -> float | None:
    """Seconds that `max_time` means: a number of seconds, or 90s, 5m, 2h, 1d; None for null."""
    if max_time is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(max_time))
    if match is None or float(match[1]) <= 0:
        raise UserError(f"max_time={max_time}; expected a time such as 90s, 5m, 2h or 1d, or null.")
    return float(match[1]) * _UNITS[match[2] or "s"]


def check(cfg: DictConfig, world_size: int) -> Parts:
    """Make the parts of an experiment; raises ONE `UserError` that lists every misfit, each with its fix."""
    errors: list[str] = []
    for key, least in ROOT_KEYS.items():
        collect(errors, partial(_whole, key, cfg[key], least))
    if cfg.max_samples is not None:
        collect(errors, lambda: _whole("max_samples", cfg.max_samples, 1))
    collect(errors, lambda: seconds_of(cfg.max_time))
    if cfg.resume not in ("never", "auto"):
        errors.append(f"resume={cfg.resume}; expected never or auto.")
    collect(errors, lambda: check_devices(cfg, world_size))
    if not errors:
        collect(errors, lambda: check_division(cfg, world_size))
    parts = {key: collect(errors, partial(build_node, cfg, key)) for key in _PARTS}
    for name in cfg.callback:
        if name != "checkpoint":
            continue
        monitor = cfg.callback.checkpoint.monitor
        names = [f"val/{n}" for n in getattr(parts["metric"], "names", ())]
        if names and monitor not in names:
            errors.append(f"callback.checkpoint.monitor={monitor}; expected one of {', '.join(names)}.")
    if errors:
        numbered = "".join(f"\n  {n}. {error}" for n, error in enumerate(errors, 1))
        raise UserError(errors[0] if len(errors) == 1 else f"{len(errors)} things do not fit:{numbered}")
    return Parts(
        data=parts["data"],
        tokenizer=parts["tokenizer"],
        model=parts["model"],
        objective=parts["objective"],
        optimizer=parts["optimizer"],
        schedule=parts["schedule"],
        sampling=parts["decoding"],
        metric=parts["metric"],
    )


_PARTS = ("data", "tokenizer", "model", "objective", "optimizer", "schedule", "decoding", "metric")


def check_devices(cfg: DictConfig, world_size: int) -> None:
    """Raise `UserError` if the devices asked for are not there, or the options for them do not go together."""
    import torch

    accelerator = accelerator_of(cfg)
    precision_of(cfg)
    if world_size > 1 and cfg.trainer.strategy == "single":
        raise UserError(
            f"trainer.devices={world_size} with trainer.strategy=single; set trainer.devices=1, or trainer=ddp (GPUs) "
            "or trainer=ddp_sim (processes on the CPU)."
        )
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(accelerator)
    if there is not None and world_size > there:
        raise UserError(
            f"trainer.devices={world_size}, but there {'is' if there == 1 else 'are'} {there}; set "
            f"trainer.devices={there} or fewer."
        )
    if not isinstance(cfg.trainer.compile, bool):
        raise UserError(f"trainer.compile={cfg.trainer.compile}; expected true or false.")


def check_division(cfg: DictConfig, world_size: int) -> None:
    """Raise `UserError` unless the global batch divides over devices and micro-batches; names the nearest that do."""
    batch, micro = cfg.batch_size, cfg.trainer.micro_batch_size
    if micro is not None:
        _whole("trainer.micro_batch_size", micro, 1)
    unit = world_size * (micro or 1)
    if batch % unit:
        nearest = " or ".join(str(b) for b in (batch // unit * unit, (batch // unit + 1) * unit) if b)
        what = f"{world_size} device{'s' * (world_size > 1)}" + (f" in micro-batches of {micro}" if micro else "")
        smaller = ""
        if micro and batch % world_size == 0:
            share = batch // world_size
            fits = [m for m in range(1, share + 1) if share % m == 0]
            near = sorted(fits, key=lambda m: abs(m - micro))[:2]
            smaller = f", or trainer.micro_batch_size={' or '.join(str(m) for m in sorted(near))}"
        raise UserError(f"batch_size={batch} does not divide over {what}; set batch_size={nearest}{smaller}.")


def _whole(key: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value}; expected a whole number of at least {least}.")
