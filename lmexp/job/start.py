"""What the entry does with a composed configuration. Imports nothing heavy: `--help` and `--cfg job` come by here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from lmexp.contracts import UserError
from lmexp.job.launch import launch
from lmexp.job.plan import Plan


def register_plugins(command_line: Sequence[str] = ("-m",)) -> None:
    """Let Hydra find lmexp's sweeper and launcher, if the command line asks for several jobs."""
    folder = str(Path(__file__).parent / "plugins")
    if folder not in sys.path and ({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(command_line)):
        sys.path.append(folder)


def with_checkpoint(arguments: Sequence[str]) -> list[str]:
    """The command line with its keys of `data`, `callback` and `metric` set whether or not the options chosen have
    them, if it names a checkpoint: that one's configuration says which there are (`restore`). Those of a data set that
    the command line chooses are left as they are."""
    if not any(argument.startswith("ckpt=") and argument != "ckpt=null" for argument in arguments):
        return list(arguments)
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    chosen = any(argument.startswith("data=") for argument in arguments)
    groups = ("callback.", "metric.") if chosen else ("data.", "callback.", "metric.")
    return [f"++{argument}" if argument.startswith(groups) and "=" in argument else argument for argument in arguments]


def start(cfg: DictConfig, run_id: str) -> float | None:
    """Run the job; returns its metric for sweepers. A job of lmexp's own sweeper, under another launcher than lmexp's,
    keeps in the sweep's ledger how it ended.

    Raises what the job raises.
    """
    plan = Plan.freeze(cfg, run_id)
    if cfg.seeds is not None:
        raise UserError(f"seeds={cfg.seeds} is an axis of a sweep; start it with -m, or set seed.")
    if cfg.sweep.key is None:
        return launch(plan)
    from lmexp.job.sweep import run_job

    return run_job(plan)
