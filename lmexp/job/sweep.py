"""`-m`: jobs from a command line with several values, each run once to its end however often the command is stopped.

Hydra's plugins: `LmexpSweeper` says which jobs there are, asks the ledger of the sweep's directory which of them are
left, and gives them to a launcher: `LmexpLauncher`, processes of this machine in slots, or any other one of Hydra's
(SLURM, Ray), whose jobs then write into the ledger themselves.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmexp.contracts import Interrupted, UserError
from lmexp.job.errors import USER_ERROR, ChildFailed
from lmexp.job.launch import Ranks, device_count
from lmexp.job.plan import ADDED, Plan, choices_of, slug
from lmexp.job.pool import Board, Job, Pool, name_of, record, retries_of, slots_for
from lmexp.job.search import Interval, Search, Space, SweepSettings, check_space, settings_of
from lmexp.run.directory import write_atomically, write_json
from lmexp.run.ledger import ENDED_WELL, Entry, Ledger, key_of

HOW = (
    *("trainer", "logger", "log_every", "callback.progress", "data.num_workers", "data.prefetch"),
    *(f"callback.checkpoint.{name}" for name in ("every_steps", "every_minutes", "keep", "background")),
)
"""Keys that say how, not what: unless a sweep varies them, a job with another value is the same job."""

NOT_CONTENT = ("paths", "resume", "seeds", "sweep", "callback.checkpoint.sharded")
"""Keys that are no part of what a job computes."""


def _is_under(key: str, names: Sequence[str]) -> bool:
    """Whether the key of an override is one of these or stands below one."""
    return any(f"{key.lstrip('+')}.".startswith(f"{name}.") for name in names)


def run_job(plan: Plan) -> float:
    """Run a job of a sweep that another launcher started, and keep in the ledger how it ended; nan if not well."""
    cfg = plan.config
    ledger = Ledger(cfg.sweep.dir)
    entry = ledger.read(cfg.sweep.key)
    assert entry is not None, "the sweeper writes it before it launches"
    with ledger.held(entry.key) as free:
        known = ledger.read_file(entry.key) or entry
        if not free or known.status in ENDED_WELL:  # it was launched twice: another one runs it, or has
            return float("nan")
        entry.status, entry.said, entry.attempts = "running", "", entry.attempts + 1
        ledger.write(entry)
        start = time.monotonic()
        with Ranks(plan, device_count(plan), output=ledger.console(entry.key)) as ranks:
            outcome = ranks.wait()
        record(entry, outcome, time.monotonic() - start, bool(ranks.signals))
        ledger.write(entry)
    if entry.status == "stopped":
        ranks.tell_of_signal()  # Submitit asks SLURM to start the job again
    return float("nan") if outcome.metric is None else outcome.metric


class Jobs:
    """Makes jobs of overrides."""

    def __init__(self, context: HydraContext, config: DictConfig, ledger: Ledger) -> None:
        self.context, self.config, self.ledger = context, config, ledger

    def make(self, overrides: Sequence[str], point: dict[str, str], trial: int | None = None) -> Job:
        """The job of these overrides; what the ledger knows of it is in its entry.

        Raises what Hydra raises for overrides that do not fit, and `UserError` for values that do not resolve.
        """
        composed = self.context.config_loader.load_sweep_config(self.config, [*overrides, "seeds=null"])
        choices = choices_of(composed.hydra)
        content = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
        del content["hydra"]
        cfg = OmegaConf.create(content)
        sweep_dir = self.ledger.sweep_dir
        resolved = cfg.copy()
        resolved.paths = dict.fromkeys(cfg.paths)  # where things lie makes no other job
        plain = cast(dict[str, Any], OmegaConf.to_container(Plan.of(resolved, choices, [], True).config))
        as_before = (name for name, value in ADDED.items() if OmegaConf.select(cfg, name) == value)
        for name in (*NOT_CONTENT, *HOW, *as_before):
            *parents, last = name.split(".")
            node = plain
            for parent in parents:
                node = node.get(parent) or {}
            node.pop(last, None)
        varied = {key: value for key, value in point.items() if _is_under(key, HOW)}
        key = key_of({"config": plain, "how": varied})
        entry = self.ledger.read(key)
        if entry is None:
            name = slug([f"{k}={v}" for k, v in point.items()])
            name = name if trial is None else f"{trial:04}-{name}"
            entry = Entry(key, list(overrides), point, cfg.seed, str(sweep_dir / f"{name}-{key[:6]}"), trial=trial)
        else:
            entry.overrides, entry.point = list(overrides), point
        if entry.status in ENDED_WELL and self.trains(plain) and not (Path(entry.run_dir) / "metrics.json").exists():
            entry.status, entry.said = "waiting", "its run is gone"
        cfg.sweep.dir, cfg.sweep.key, cfg.sweep.trial = str(sweep_dir), key, trial
        if self.trains(plain):
            cfg.paths.run_dir, cfg.resume = entry.run_dir, "auto"
        return Job(entry, Plan.of(cfg, choices, list(overrides), True))

    def refused(self, overrides: Sequence[str], point: dict[str, str], trial: int, why: str) -> Entry:
        """The entry, kept in the ledger, of a trial that no job can be made of."""
        key = key_of({"refused": point, "trial": trial})
        entry = Entry(key, list(overrides), point, self.config.seed, "", trial=trial)
        entry.status, entry.said, entry.code = "failed", " ".join(why.split())[:500], USER_ERROR
        self.ledger.write(entry)
        return entry

    @staticmethod
    def trains(config: dict[str, Any]) -> bool:
        """Whether a job makes a run of its own."""
        return str(config["job"]["_target_"]).endswith(".train")

    def handed_over(self, job: Job) -> list[str]:
        """The overrides that make another launcher run just this job."""
        cfg = job.plan.config
        own = {f"sweep.{name}": cfg.sweep[name] for name in ("dir", "key", "trial") if cfg.sweep[name] is not None}
        own |= {"hydra.sweep.dir": cfg.sweep.dir}
        if self.trains(cast(dict[str, Any], cfg)):
            own |= {"paths.run_dir": cfg.paths.run_dir, "resume": cfg.resume}
        return [*job.plan.overrides, "seeds=null", *(f"{key}={_quoted(value)}" for key, value in own.items())]


class LmexpLauncher(Launcher):
    """Jobs as processes of this machine."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """For other sweepers than ours: run these jobs, return what each gave."""
        settings = settings_of(self.config)
        ledger = Ledger(self.config.hydra.sweep.dir)
        jobs = Jobs(self.context, self.config, ledger)
        made = [jobs.make(list(o), dict(x.lstrip("+").split("=", 1) for x in o if "=" in x)) for o in job_overrides]
        waiting = iter([job for job in made if job.entry.status not in ENDED_WELL])
        slots = slots_for(made[0].plan, settings.slots, len(made))
        board = Board(ledger.entries, len(made), settings.monitors[0])
        Pool(slots, ledger, settings.on_fail, board).run(lambda: next(waiting, None), lambda entry: None)
        returns = []
        for job, overrides in zip(made, job_overrides, strict=True):
            value = job.entry.metrics.get(settings.monitors[0], job.entry.metrics.get("metric", float("nan")))
            status = JobStatus.COMPLETED if job.entry.status in ENDED_WELL else JobStatus.FAILED
            told = JobReturn(list(overrides), job.plan.config, status=status)
            told.return_value = value if status == JobStatus.COMPLETED else ChildFailed(1)
            returns.append(told)
        return returns


class LmexpSweeper(Sweeper):
    """Grids and searches that go on where they were."""

    config: DictConfig
    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.context, self.config = hydra_context, config
        # resolved here, once: another process would find another identifier
        OmegaConf.set_readonly(config, False)
        config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir).absolute())
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is left of the sweep; prints the table of all of it."""
        from lmexp.job.sweep_report import report_on

        if "LOCAL_RANK" in os.environ:
            raise UserError("-m with torchrun: each process would run the sweep. Start -m alone; jobs start their own.")
        settings = settings_of(self.config)
        retries_of(settings.on_fail)
        fixed, space = self._parse(arguments, settings)
        check_space(settings, space)
        ledger = Ledger(self.config.hydra.sweep.dir)
        jobs = Jobs(self.context, self.config, ledger)
        seeds = seeds_of(self.config, space)
        searching = settings.method != "grid" or settings.pruner is not None
        if settings.pruner is not None and len(seeds or ()) > 1:
            raise UserError(
                f"seeds={self.config.seeds} with sweep.pruner={settings.pruner}, which compares single runs while they "
                "go on; set sweep.pruner=null, or sweep the best values over seeds when the search is done."
            )
        if seeds is not None and not searching:
            space["seed"] = [str(seed) for seed in seeds]
        try:
            if searching:
                ended = self._search(settings, fixed, space, seeds or [], ledger, jobs)
            else:
                ended = self._grid(settings, fixed, space, ledger, jobs)
        finally:
            if ledger.exists():
                report_on(ledger, settings.monitors, settings.modes)
        bad = ("failed", "diverged", "killed", *(() if isinstance(self.launcher, LmexpLauncher) else ("running",)))
        wrong = [entry for entry in ended if entry.status in bad]
        if wrong:
            told = "".join(f"\n  {name_of(entry)}: {entry.status}: {entry.said}" for entry in wrong[:10])
            print(
                f"Error: {len(wrong)} of the sweep's jobs failed:{told}\nWhat each printed: {ledger.path}/*.log. Run "
                f"them again by the same command and hydra.sweep.dir={ledger.sweep_dir}",
                file=sys.stderr,
            )
            raise ChildFailed(USER_ERROR if all(entry.code == USER_ERROR for entry in wrong) else 1)
        return None

    def _grid(self, settings: SweepSettings, fixed: list[str], space: Space, ledger: Ledger, jobs: Jobs) -> list[Entry]:
        listed = {key: values for key, values in space.items() if not isinstance(values, Interval)}
        points = [dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())]
        made = [jobs.make(_with(fixed, point), point) for point in points]
        by_key = {job.entry.key: job for job in made}  # two points may be the same job
        left = sum(job.entry.status not in ENDED_WELL for job in by_key.values())
        sample = max((job.plan for job in made), key=device_count)
        if isinstance(self.launcher, LmexpLauncher):
            slots_for(sample, settings.slots, left)  # errors before anything is begun
        self._begin(ledger, settings, fixed, [f"{k}={','.join(v)}" for k, v in listed.items()], set(by_key))
        for job in by_key.values():
            if ledger.read(job.entry.key) is None or job.entry.status == "waiting":
                ledger.write(job.entry)
        waiting = iter([job for job in by_key.values() if job.entry.status not in ENDED_WELL])
        print(f"Sweep: {len(by_key)} jobs, {len(by_key) - left} of them done already, in {ledger.sweep_dir}")
        if left:
            known = {job.entry.key: job.entry for job in by_key.values()}
            board = Board(lambda: list(known.values()), len(known), settings.monitors[0])
            self._run(settings, lambda: next(waiting, None), lambda entry: None, ledger, jobs, board, sample, left)
        return [ledger.read(key) or by_key[key].entry for key in by_key]

    def _search(
        self, settings: SweepSettings, fixed: list[str], space: Space, seeds: list[int], ledger: Ledger, jobs: Jobs
    ) -> list[Entry]:
        """`seeds`: those that each trial is a job for; none: one job, whatever its seed."""

        def points_of(values: dict[str, str]) -> list[dict[str, str]]:
            return [values | {"seed": str(seed)} for seed in seeds] or [values]

        sample = {k: v[0] if not isinstance(v, Interval) else v.text(v.low) for k, v in space.items()}
        (point, *_) = points_of(sample)
        first = jobs.make(_with(fixed, point), point)  # errors before anything is begun
        for key, several in space.items():  # a value that fits nowhere, too
            for value in () if isinstance(several, Interval) else several[1:]:
                (point, *_) = points_of(sample | {key: value})
                jobs.make(_with(fixed, point), point)
        each = len(seeds) or 1
        if isinstance(self.launcher, LmexpLauncher):
            slots = len(slots_for(first.plan, settings.slots, settings.trials * each))
        elif settings.slots == "auto":
            raise UserError("A search over another launcher needs sweep.slots, the number of jobs to run at a time.")
        else:
            slots = int(settings.slots)
        self._begin(ledger, settings, fixed, [f"{k}={v}" for k, v in space.items()])
        content = [o for o in fixed if not _is_under(o.split("=", 1)[0], (*HOW, *NOT_CONTENT))]
        common = dict(o.lstrip("+").split("=", 1) for o in content) | ({"seeds": str(seeds)} if seeds else {})
        search = Search(settings, ledger.sweep_dir, space, slots > 1, common)
        known: dict[int, list[Entry]] = {}  # trial -> its jobs
        for entry in ledger.entries():
            if entry.trial is not None:
                known.setdefault(entry.trial, []).append(entry)
        again = iter(search.unfinished())
        ready: deque[Job] = deque()  # of a trial that is begun
        run: list[Entry] = []  # in this call
        twins: dict[int, list[int]] = {}  # trials with the values of one that runs
        left_of: dict[int, set[str]] = {}  # trial -> keys of its jobs that are still to end in this call

        def settle(number: int, *also: int) -> bool:
            """Tell the search what came of a trial, once all of its jobs have ended; whether they have."""
            entries = [ledger.read(entry.key) or entry for entry in known[number]]  # some may be another command's
            if any(entry.status in ("waiting", "running", "stopped") for entry in entries):
                return False
            left = left_of.get(number, set())  # one that failed before, or may be tried again
            if any(entry.key in left and entry.status not in ENDED_WELL for entry in entries):
                return False
            values: list[float] | None = None
            if all(e.status == "done" and all(name in e.metrics for name in settings.monitors) for e in entries):
                values = [fmean(entry.metrics[name] for entry in entries) for name in settings.monitors]
            pruned = any(entry.status == "pruned" for entry in entries)
            for one in also or (number, *twins.pop(number, ())):
                search.tell(one, values, pruned=pruned)
            return True

        def ended(entry: Entry) -> None:
            if entry.status in ("stopped", "running"):
                return  # the trial goes on with the next call, or in another process
            run.append(entry)
            assert entry.trial is not None
            left_of.get(entry.trial, set()).discard(entry.key)
            settle(entry.trial)

        def begin(number: int, values: dict[str, str]) -> None:
            """Make ready what is left to run of a trial."""
            points = points_of(values)
            try:
                made = [jobs.make(_with(fixed, point), point, number) for point in points]
            except (UserError, HydraException, OmegaConfBaseException) as error:  # values that do not fit together
                entry = jobs.refused(_with(fixed, points[0]), points[0], number, str(error))
                known[number] = [entry]
                board.say(entry)
                ended(entry)
                return
            for job in made:
                if job.entry.trial is None:  # of a grid in the same directory
                    job.entry.trial = number
                    ledger.write(job.entry)
            owner = made[0].entry.trial
            assert owner is not None
            if owner != number:  # the same values as an earlier trial's
                known.setdefault(owner, [job.entry for job in made])
                if not settle(owner, number):
                    twins.setdefault(owner, []).append(number)
                return
            known[number] = [job.entry for job in made]
            left = [job for job in made if job.entry.status not in ENDED_WELL]
            for job in left:
                if ledger.read_file(job.entry.key) is None:
                    ledger.write(job.entry)
            ready.extend(left)
            left_of[number] = {job.entry.key for job in left}
            if not left:  # the process was killed between the end and the telling
                run.extend(known[number])
                settle(number)

        def source() -> Job | None:
            while not ready:
                drawn = next(again, None) or search.next()
                if drawn is None:
                    return None
                begin(*drawn)
            return ready.popleft()

        board = Board(
            lambda: [entry for entries in known.values() for entry in entries],
            search.total * each,
            settings.monitors[0],
        )
        self._run(settings, source, ended, ledger, jobs, board, first.plan, slots)
        return run

    def _run(
        self,
        settings: SweepSettings,
        source: Callable[[], Job | None],
        ended: Callable[[Entry], None],
        ledger: Ledger,
        jobs: Jobs,
        board: Board,
        sample: Plan,
        most: int,
    ) -> None:
        if isinstance(self.launcher, LmexpLauncher):
            slots = slots_for(sample, settings.slots, most)
            print(f"{len(slots)} at a time.", flush=True)
            Pool(slots, ledger, settings.on_fail, board).run(source, ended)
            return
        started, times = 0, Counter[str]()  # jobs that were launched, and how often each
        again: list[Job] = []
        while True:  # another launcher takes jobs by the batch and returns when all of them have ended
            count = most if settings.slots == "auto" else int(settings.slots)
            batch, again = again[:count], again[count:]
            batch += [job for job in (source() for _ in range(count - len(batch))) if job is not None]
            if not batch:
                return
            said, lost = "its launcher started it and it never wrote into the ledger", False
            for job in batch:
                if not ledger.is_held(job.entry.key):
                    job.entry.status, job.entry.said = "waiting", ""
                    ledger.write(job.entry)

            def look(batch: list[Job] = batch) -> None:
                for job in batch:
                    job.entry.__dict__.update(vars(ledger.read_file(job.entry.key) or job.entry))

            try:
                with board.watching(look):
                    self.launcher.launch([jobs.handed_over(job) for job in batch], started)
            except Exception as error:  # of one job that was lost, by any library; the ledger knows the others
                said, lost = f"{type(error).__name__}: {error}".splitlines()[0], True
            started += len(batch)
            for job in batch:
                entry = ledger.read(job.entry.key) or job.entry
                may_come = lost and entry.status in ("waiting", "running")  # launchers give up on all for one
                if entry.status == "waiting":
                    entry.status, entry.said = "failed", said[:500]
                    ledger.write(entry)
                job.entry.__dict__.update(entry.__dict__)
                board.say(entry)
                times[entry.key] += 1
                wrong = entry.status in ("failed", "killed") and not may_come
                if wrong and times[entry.key] <= retries_of(settings.on_fail):
                    again.append(job)
                    continue
                ended(entry)
                if entry.status == "stopped":
                    raise Interrupted(
                        f"a job was stopped; go on with the same command and hydra.sweep.dir={ledger.sweep_dir}"
                    )
            if settings.on_fail == "stop" and any(job.entry.status not in ENDED_WELL for job in batch):
                return

    def _parse(self, arguments: list[str], settings: SweepSettings) -> tuple[list[str], Space]:
        """The overrides that all jobs share, and the values of the others."""
        own = [f"{key}={value}" for key, value in settings.space.items()]
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        fixed: dict[str, str] = {}
        space: Space = {}
        for override in parser.parse_overrides([*own, *arguments]):
            key = override.get_key_element()
            fixed.pop(key, None)
            space.pop(key, None)
            if key.lstrip("+") in ("paths.run_dir", "resume"):
                raise UserError(
                    f"{key} has no place in a sweep: each job has its own directory, below hydra.sweep.dir, and goes "
                    "on with what is there."
                )
            if key.lstrip("+") == "seeds":
                continue  # read from the composed configuration
            if override.is_sweep_override():
                space[key] = _values_of(override)
            else:
                fixed[key] = f"{key}={override.get_value_element_as_str()}"
        return list(fixed.values()), space

    def _begin(
        self,
        ledger: Ledger,
        settings: SweepSettings,
        fixed: list[str],
        varied: list[str],
        keys: set[str] | None = None,
    ) -> None:
        """Keep what the sweep is asked for, for reports and for later calls; `keys`: of its jobs, None: all."""
        ledger.sweep_dir.mkdir(parents=True, exist_ok=True)
        asked = {
            "method": settings.method,
            "monitor": list(settings.monitors),
            "mode": list(settings.modes),
            "overrides": [*fixed, *varied],
        }
        write_atomically(ledger.sweep_dir / "sweep.yaml", OmegaConf.to_yaml(OmegaConf.create(asked)))
        if keys is None:
            (ledger.sweep_dir / "jobs.json").unlink(missing_ok=True)
        else:
            write_json(ledger.sweep_dir / "jobs.json", {"keys": sorted(keys)})


def seeds_of(config: DictConfig, space: Space) -> list[int] | None:
    """The seeds of the axis `seeds`; None: there is none."""
    seeds = config.seeds
    if seeds is None:
        return None
    if "seed" in space:
        raise UserError(f"seeds={seeds} and several values of seed; give one of the two.")
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return [config.seed + n for n in range(seeds)]
    listed = list(seeds) if OmegaConf.is_list(seeds) else []
    if not listed or any(not isinstance(s, int) or s < 0 for s in listed) or len(set(listed)) < len(listed):
        raise UserError(f"seeds={seeds}; expected a number of at least 1, or a list of different seeds such as [1,5].")
    return listed


def _values_of(override: Override) -> list[str] | Interval:
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None
        assert high is not None
        whole = "int" in value.tags or (isinstance(low, int) and isinstance(high, int))
        log = "log" in value.tags
        if not low < high or (log and low <= 0):
            raise UserError(
                f"{override.key_or_group}: interval({low},{high}); expected a lower and a higher number"
                + (", above zero for log." if log else ".")
            )
        return Interval(float(low), float(high), log, whole)
    return list(override.sweep_string_iterator())


def _with(fixed: Sequence[str], point: Mapping[str, str]) -> list[str]:
    """The overrides of the job at a point."""
    return [*fixed, *(f"{key}={value}" for key, value in point.items())]


def _quoted(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    if not isinstance(value, str):
        return str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
