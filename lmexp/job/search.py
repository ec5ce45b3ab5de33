"""Searches through Optuna: what to try next, from what has been seen; kept in the sweep's directory.

The study is a journal file (Optuna's own format), so that a search goes on after any end of the process, and several
processes can share it. A sampler draws from (search_seed, number of the trial) alone: with one slot, a search that was
interrupted tries what it would have tried.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from lmexp.contracts import UserError

if TYPE_CHECKING:
    import optuna

METHODS = ("grid", "random", "tpe", "cmaes")
PRUNERS = ("median", "halving")


@dataclass(frozen=True)
class SweepSettings:
    """The group `sweep`; its keys are explained there."""

    method: str
    space: dict[str, Any]
    slots: int | str
    on_fail: str
    monitor: str | list[str]
    mode: str | list[str]
    trials: int
    search_seed: int
    pruner: str | None
    pruner_startup: int
    pruner_warmup: int
    pruner_factor: int
    dir: str | None = None
    key: str | None = None
    trial: int | None = None

    monitors: tuple[str, ...] = field(init=False)
    """The numbers that jobs are compared by."""

    modes: tuple[str, ...] = field(init=False)
    """min or max, for each."""

    def __post_init__(self) -> None:
        monitors = [self.monitor] if isinstance(self.monitor, str) else list(self.monitor)
        modes = [self.mode] * len(monitors) if isinstance(self.mode, str) else list(self.mode)
        object.__setattr__(self, "monitors", tuple(monitors))
        object.__setattr__(self, "modes", tuple(modes))
        if self.method not in METHODS:
            raise UserError(f"sweep.method={self.method}; expected one of {', '.join(METHODS)}.")
        if not monitors or len(monitors) != len(modes) or any(mode not in ("min", "max") for mode in modes):
            raise UserError(
                f"sweep.mode={self.mode} for sweep.monitor={self.monitor}; expected min or max, or a list of as many."
            )
        whole = {"trials": 1, "search_seed": 0, "pruner_startup": 0, "pruner_warmup": 0, "pruner_factor": 2}
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"sweep.{name}={value}; expected a whole number of at least {least}.")
        if self.pruner is not None:
            if self.pruner not in PRUNERS:
                raise UserError(f"sweep.pruner={self.pruner}; expected {' or '.join(PRUNERS)}, or null.")
            if len(monitors) > 1:
                raise UserError("sweep.pruner needs one sweep.monitor: by several, no job is simply behind another.")
            if self.pruner == "halving" and self.pruner_warmup < 1:
                raise UserError("sweep.pruner=halving needs sweep.pruner_warmup, the steps of its first rung, >= 1.")


def settings_of(config: DictConfig) -> SweepSettings:
    """The group `sweep` of a composed configuration. Raises `UserError` for values that do not fit."""
    node = cast(dict[str, Any], OmegaConf.to_container(config.sweep, resolve=True))
    picks: Any = config.callback.get("checkpoint") or {"monitor": "val/loss", "mode": "min"}
    if node.get("monitor") is None:
        node |= {"monitor": picks["monitor"], "mode": node.get("mode") or picks["mode"]}
    elif node.get("mode") is None:
        if node["monitor"] != picks["monitor"]:
            raise UserError(f"sweep.monitor={node['monitor']} needs sweep.mode: whether min or max is better.")
        node["mode"] = picks["mode"]
    try:
        return SweepSettings(**node)
    except TypeError as error:
        raise UserError(f"sweep: {error}; conf/sweep/base.yaml has its keys.") from error


@dataclass(frozen=True)
class Interval:
    """Numbers between two."""

    low: float
    high: float
    log: bool
    whole: bool

    def text(self, value: float) -> str:
        """One of its numbers, for an override."""
        return str(int(value) if self.whole else value)

    def __str__(self) -> str:
        return f"interval({self.text(self.low)}, {self.text(self.high)}{', log' if self.log else ''})"


Space = dict[str, "list[str] | Interval"]
"""Key -> its values, as text for an override, or an interval."""


def connect(settings: SweepSettings, sweep_dir: Path, create: bool = False) -> optuna.Study:
    """The study of a sweep. Raises `UserError` without Optuna, and for a study that is to do something else."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(
            f"sweep.method={settings.method} and sweep.pruner={settings.pruner} need Optuna. Install the extra: "
            "pip install 'lmexp[sweep]'"
        ) from error
    if settings.method == "cmaes" and importlib.util.find_spec("cmaes") is None:  # Optuna itself would find out late
        raise UserError("sweep=cmaes needs the package cmaes. Install the extra: pip install 'lmexp[sweep]'")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = JournalStorage(JournalFileBackend(str(sweep_dir / "study.journal")))
    directions: list[Any] = ["minimize" if mode == "min" else "maximize" for mode in settings.modes]
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if settings.pruner == "median":
        pruner = optuna.pruners.MedianPruner(settings.pruner_startup, settings.pruner_warmup)
    elif settings.pruner == "halving":
        pruner = optuna.pruners.SuccessiveHalvingPruner(settings.pruner_warmup, settings.pruner_factor)
    if not create:
        return optuna.load_study(study_name="sweep", storage=storage, pruner=pruner)
    with FileLock(sweep_dir / ".study.lock"):
        study = optuna.create_study(
            study_name="sweep", storage=storage, pruner=pruner, directions=directions, load_if_exists=True
        )
    found = [str(direction.name).lower() for direction in study.directions]
    if found != directions:
        raise UserError(
            f"{sweep_dir} holds a search that is to {' and '.join(found)}, not to {' and '.join(directions)}. Set "
            "sweep.monitor and sweep.mode as they were, or begin another sweep."
        )
    return study


def check_space(settings: SweepSettings, space: Space) -> None:
    """Raise `UserError` for a space that the method cannot search."""
    intervals = [key for key, values in space.items() if isinstance(values, Interval)]
    if not space and settings.method != "grid":
        raise UserError(
            f"sweep={settings.method}: there is nothing to search. Give a key several values or an interval: "
            "'optimizer.lr=tag(log,interval(1e-4,1e-1))'."
        )
    if settings.method == "grid" and intervals:
        raise UserError(
            f"{', '.join(intervals)}: a grid needs values, not an interval; list them, or search with sweep=tpe."
        )
    if settings.method == "cmaes" and len(settings.monitors) > 1:
        raise UserError(
            f"sweep=cmaes looks for the best of one number, and sweep.monitor={list(settings.monitors)} names "
            f"{len(settings.monitors)}; use sweep=tpe, or name one."
        )
    if settings.method == "cmaes" and len(intervals) < len(space):
        listed = ", ".join(key for key in space if key not in intervals)
        raise UserError(f"sweep=cmaes searches intervals only, and {listed} is a list; use sweep=tpe.")


class Search:
    """Says which values to try, and learns what came of them."""

    def __init__(
        self,
        settings: SweepSettings,
        sweep_dir: Path,
        space: Space,
        several: bool,
        fixed: Mapping[str, str] | None = None,
    ) -> None:
        """`several`: jobs run beside one another, so that those under way should be kept
        away from. `fixed`: what all trials have in common."""
        self.settings, self.sweep_dir, self.space, self.several = settings, sweep_dir, space, several
        self.study = connect(settings, sweep_dir, create=True)
        self._refuse_another({key: str(values) for key, values in space.items()} | dict(fixed or {}))
        self._grid = _combinations(space) if settings.method == "grid" else []

    def _refuse_another(self, asked: dict[str, str]) -> None:
        """Raise `UserError` if the study was begun for other trials than these."""
        before = self.study.user_attrs.get("asked")
        if before is None:
            self.study.set_user_attr("asked", asked)
        elif before != asked:
            keys = [key for key in sorted(before | asked) if before.get(key) != asked.get(key)]
            told = "; ".join(f"{key}: was {before.get(key)}, now {asked.get(key)}" for key in keys)
            raise UserError(
                f"{self.sweep_dir} holds a search of something else ({told}). What was tried there does not count in "
                "this one: set it as it was, or begin another sweep."
            )

    @property
    def total(self) -> int:
        """Trials that there will be."""
        return max(len(self._grid) or self.settings.trials, len(self._trials()))

    def unfinished(self) -> list[tuple[int, dict[str, str]]]:
        """Trials that were begun and not told of: number and values."""
        found = []
        for t in self._trials():
            if not t.state.is_finished() and len(t.params) == len(self.space):
                found.append((t.number, self._values(t.params)))
        return found

    def next(self) -> tuple[int, dict[str, str]] | None:
        """A new trial's number and values; None if all have been given out."""
        import optuna

        with FileLock(self.sweep_dir / ".study.lock"):  # no two processes draw for the same number
            for trial in self._trials():  # of a process that was killed in the midst of this: it stands for nothing
                if trial.state == optuna.trial.TrialState.RUNNING and len(trial.params) < len(self.space):
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            trials = [t for t in self._trials() if len(t.params) == len(self.space)]
            number = len(trials)
            if self.settings.method == "grid":
                tried = [self._values(t.params) for t in trials]  # one that failed is over, too
                left = [values for values in self._grid if values not in tried]
                if not left:
                    return None
                if not self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
                    self.study.enqueue_trial(dict(left[0]), skip_if_exists=False)
                sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=0)
            elif number >= self.settings.trials:
                return None
            else:
                sampler = self._sampler(number)
            self.study.sampler = sampler
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Optuna's: a queued trial needs no sampler
                trial = self.study.ask(fixed_distributions=self._distributions())
        return trial.number, self._values(trial.params)

    def tell(self, number: int, values: Sequence[float] | None, pruned: bool = False) -> None:
        """What came of a trial; no values, or one that is not finite: it failed."""
        import optuna

        state = optuna.trial.TrialState.COMPLETE
        if pruned:
            state = optuna.trial.TrialState.PRUNED
        elif values is None or not all(math.isfinite(value) for value in values):
            state = optuna.trial.TrialState.FAIL
        told = None if state != optuna.trial.TrialState.COMPLETE else list(values or ())
        self.study.tell(number, told, state=state, skip_if_finished=True)

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def _sampler(self, number: int) -> Any:
        import optuna

        seed = self.settings.search_seed * 1_000_003 + number
        if self.settings.method == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self.settings.method == "tpe":
            startup = max(1, min(10, self.settings.trials // 3))
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=self.several)
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        made: dict[str, Any] = {}
        for key, values in self.space.items():
            if not isinstance(values, Interval):
                made[key] = CategoricalDistribution(values)
            elif values.whole:
                made[key] = IntDistribution(int(values.low), int(values.high), log=values.log)
            else:
                made[key] = FloatDistribution(values.low, values.high, log=values.log)
        return made

    def _values(self, params: Mapping[str, Any]) -> dict[str, str]:
        return {key: str(params[key]) for key in self.space if key in params}


def _combinations(space: Space) -> list[dict[str, str]]:
    found: list[dict[str, str]] = [{}]
    for key, values in space.items():
        assert not isinstance(values, Interval), "the sweeper refuses these for a grid"
        found = [{**one, key: value} for one in found for value in values]
    return found


def front(points: Sequence[Sequence[float]], modes: Sequence[str]) -> list[bool]:
    """Whether each point is on the Pareto front: no other is at least as good in all and better in one."""
    signed = [[v if mode == "min" else -v for v, mode in zip(point, modes, strict=True)] for point in points]
    return [
        not any(all(a <= b for a, b in zip(other, one, strict=True)) and other != one for other in signed)
        for one in signed
    ]


def running_trial(settings: SweepSettings) -> Any:
    """Optuna's trial of the job that these settings are for, to report to."""
    import optuna

    assert settings.dir is not None
    assert settings.trial is not None
    study = connect(settings, Path(settings.dir))
    found = study.get_trials(deepcopy=False)[settings.trial]
    return optuna.trial.Trial(study, found._trial_id)
