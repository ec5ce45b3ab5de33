"""Runs the jobs of a sweep in slots, one GPU each or a share of the cores, and keeps what becomes of each."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lmexp.contracts import Interrupted, UserError
from lmexp.job.launch import Outcome, Ranks, cores, device_count
from lmexp.job.plan import Plan
from lmexp.run.ledger import ENDED_WELL, Entry, Ledger
from lmexp.run.signals import SIGNALS, TWICE_S
from lmexp.run.terminal import clock

_STYLES = {"done": "green", "pruned": "cyan", "running": "bold", "waiting": "dim", "stopped": "yellow"}

_ROWS = 30
"""Jobs that the live table shows at once."""


@dataclass(frozen=True)
class Job:
    """One run to make."""

    entry: Entry
    plan: Plan


@dataclass(frozen=True)
class Slot:
    """Where one job runs at a time."""

    cores: frozenset[int] = frozenset()
    """CPU cores that are its own; empty: all."""

    gpus: tuple[str, ...] = ()
    """GPUs that are its own, as CUDA_VISIBLE_DEVICES names them; empty: no restriction."""

    processes: int = 1
    """Of a job, which share the cores."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables for its jobs."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return {"OMP_NUM_THREADS": str(max(1, len(self.cores) // self.processes))} if self.cores else {}


def slots_for(plan: Plan, wanted: int | str, most: int | None) -> list[Slot]:
    """Slots for jobs like this one; `wanted`: their number, or auto, as many as the machine has room for, at most
    `most`, as there are no more jobs."""
    if wanted != "auto" and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise UserError(f"sweep.slots={wanted}; expected a number of at least 1, or auto.")
    gpus = _gpus(plan)
    per_job = device_count(plan)
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    room = max(1, (len(gpus) or len(available)) // per_job)
    count = room if wanted == "auto" else int(wanted)
    if most is not None:
        count = max(1, min(count, most))
    if gpus:
        if wanted != "auto" and count > room:
            raise UserError(
                f"sweep.slots={wanted}: jobs of {per_job} GPUs do not fit so often on {len(gpus)}; {room} at most."
            )
        return [Slot(gpus=tuple(gpus[n * per_job : (n + 1) * per_job])) for n in range(count)]
    if count == 1 or count > len(available):
        return [Slot() for _ in range(count)]
    share = len(available) // count
    return [Slot(frozenset(available[n * share : (n + 1) * share]), processes=per_job) for n in range(count)]


def _gpus(plan: Plan) -> list[str]:
    if plan.config.trainer.accelerator not in ("cuda", "auto"):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


class Pool:
    """Takes jobs from a source as slots become free, until there are none."""

    def __init__(self, slots: Sequence[Slot], ledger: Ledger, on_fail: str, board: Board) -> None:
        """`on_fail`: continue; stop, start no more once a job has failed; or retry:N, run it again up to N times."""
        self.slots, self.ledger, self.board = list(slots), ledger, board
        self.stops = on_fail == "stop"
        self.retries = retries_of(on_fail)
        self.signal: int | None = None
        self._closing = False
        self._signalled = 0.0

    def run(self, source: Callable[[], Job | None], ended: Callable[[Entry], None]) -> None:
        """`source` gives the next job, or None when there is none left; `ended` is told of each that has ended.

        The first signal is handed on, so that jobs save and end; then `Interrupted` is raised. The second ends them.
        """
        free, running = list(self.slots), list[_Running]()
        old = {number: signal.signal(number, self._on_signal(running)) for number in SIGNALS}
        try:
            with self.board:
                while True:
                    while free and not self._closing and (job := source()) is not None:
                        self._start(job, free, running, ended)
                    if not running:
                        break
                    time.sleep(0.05)
                    for one in list(running):
                        if not one.ranks.running():
                            self._end(one, free, running, ended)
                    self.board.update({one.job.entry.key: time.monotonic() - one.started for one in running})
        finally:
            for one in running:
                one.close()
            for number, handler in old.items():
                signal.signal(number, handler)
        if self.signal is not None:
            raise Interrupted(
                f"by {signal.Signals(self.signal).name}; the jobs that were running have saved what they had. Go on "
                f"with the same command and hydra.sweep.dir={self.ledger.sweep_dir}"
            )

    def _start(
        self,
        job: Job,
        free: list[Slot],
        running: list[_Running],
        ended: Callable[[Entry], None],
        again: int = 0,
    ) -> None:
        stack = ExitStack()
        if not stack.enter_context(self.ledger.held(job.entry.key)):
            stack.close()
            self.board.say(job.entry, "runs in another process")
            return
        entry = job.entry
        known = self.ledger.read_file(entry.key)
        if known is not None and known.status in ENDED_WELL and not again:  # another process has done it meanwhile
            entry.__dict__.update(known.__dict__)
            stack.close()
            self.board.say(entry)
            ended(entry)
            return
        slot = free.pop(0)
        entry.status, entry.said, entry.attempts = "running", "", entry.attempts + 1
        self.ledger.write(entry)
        try:
            ranks = Ranks(job.plan, device_count(job.plan), slot.environment, self.ledger.console(entry.key))
        except OSError as error:  # no room for its plan, no process to be had
            entry.status, entry.said = "failed", f"it could not be started: {error}"
            self.ledger.write(entry)
            stack.close()
            free.append(slot)
            self._closing |= self.stops
            self.board.say(entry)
            ended(entry)
            return
        stack.callback(ranks.close)
        for process in ranks.processes if slot.cores and hasattr(os, "sched_setaffinity") else ():
            os.sched_setaffinity(process.pid, slot.cores)  # before it has made threads
        running.append(_Running(job, slot, ranks, stack, again))
        if self.signal is not None:  # it came while this one was being started
            ranks.send(self.signal)
        self.board.say(entry)

    def _end(self, one: _Running, free: list[Slot], running: list[_Running], ended: Callable[[Entry], None]) -> None:
        entry = one.job.entry
        record(entry, one.ranks.outcome(), time.monotonic() - one.started, self.signal is not None)
        self.ledger.write(entry)
        one.close()
        running.remove(one)
        free.append(one.slot)
        self.board.say(entry)
        if entry.status in ENDED_WELL or entry.status == "stopped":
            ended(entry)
        elif one.again < self.retries and not self._closing and entry.status != "diverged":  # that would do the same
            self._start(one.job, free, running, ended, one.again + 1)
        else:
            self._closing |= self.stops
            ended(entry)

    def _on_signal(self, running: list[_Running]) -> Callable[[int, Any], None]:
        def handle(number: int, frame: Any) -> None:
            if self.signal is not None:
                if number == self.signal and time.monotonic() - self._signalled < TWICE_S:
                    return
                raise KeyboardInterrupt
            self.signal, self._closing, self._signalled = number, True, time.monotonic()
            for one in running:
                one.ranks.send(number)

        return handle


@dataclass
class _Running:
    job: Job
    slot: Slot
    ranks: Ranks
    stack: ExitStack
    again: int
    started: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        self.stack.close()


def retries_of(on_fail: str) -> int:
    """How often a failed job is run again. Raises `UserError` for a policy that there is not."""
    kind, _, number = str(on_fail).partition(":")
    if kind == "retry" and number.isdigit():
        return int(number)
    if on_fail in ("continue", "stop"):
        return 0
    raise UserError(f"sweep.on_fail={on_fail}; expected continue, stop or retry:N, such as retry:2.")


def record(entry: Entry, outcome: Outcome, seconds: float, stopping: bool = False) -> None:
    """Put into a job's entry how it ended; `stopping`: it was told to."""
    entry.seconds += seconds
    entry.code = outcome.code
    entry.said = " ".join(outcome.said.split())[:500]
    if outcome.code == 0:
        metrics = Path(entry.run_dir) / "metrics.json"
        found = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
        entry.metrics = found or ({} if outcome.metric is None else {"metric": outcome.metric})
        entry.status = "pruned" if entry.metrics.get("pruned") else "done"
    elif outcome.kind == "interrupted" or (stopping and outcome.kind == "killed"):
        entry.status = "stopped"
    elif outcome.kind == "diverged":
        entry.status = "diverged"
    else:
        entry.status = "killed" if outcome.kind == "killed" else "failed"


class Board:
    """Shows where a sweep stands: a live table in a terminal, a line for each change elsewhere."""

    def __init__(self, entries: Callable[[], list[Entry]], total: int | None, monitor: str) -> None:
        """`entries`: all jobs that are known; `total`: how many there will be."""
        self.entries, self.total, self.monitor = entries, total, monitor
        self.console = Console(highlight=False)
        self._live: Live | None = None
        self._drawn = 0.0
        self._begun = time.monotonic()

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def watching(self, look: Callable[[], None]) -> Iterator[None]:
        """Draw the table while others run the jobs; `look` finds out how these are."""
        over = threading.Event()

        def draw() -> None:
            while not over.wait(1):
                with suppress(OSError, UserError):  # of the ledger; it is read again, and its errors told, in the end
                    look()
                self.update({})

        with self:
            thread = threading.Thread(target=draw, daemon=True, name="board")
            if self._live is not None:
                thread.start()
            try:
                yield
            finally:
                over.set()
                if thread.is_alive():
                    thread.join(timeout=5)

    def say(self, entry: Entry, what: str | None = None) -> None:
        """A job has changed."""
        if self._live is not None and what is None and entry.status in ("running", "done", "pruned"):
            return  # the table shows it
        known = self.entries()
        counts = Counter(e.status for e in known)
        number = sum(counts[s] for s in ("done", "pruned", "diverged", "failed", "killed"))
        told = what or entry.status
        if entry.status in ENDED_WELL and self.monitor in entry.metrics:
            told += f", {self.monitor} {entry.metrics[self.monitor]:.5g}, {clock(entry.seconds)}"
        elif entry.said:
            told += f": {entry.said[:300]}"
        place = f"[{number}/{self.total or len(known)}]"
        self.console.print(f"{place} {name_of(entry)}: {told}", markup=False, soft_wrap=True)
        sys.stdout.flush()

    def update(self, running: dict[str, float]) -> None:
        """Draw the table anew, at most twice a second. `running`: key -> seconds since it was started."""
        if self._live is None or time.monotonic() - self._drawn < 0.5:
            return
        self._drawn = time.monotonic()
        self._live.update(self._table(running), refresh=True)

    def _table(self, running: dict[str, float]) -> Table:
        known = self.entries()
        counts = Counter(entry.status for entry in known)
        told = ", ".join(f"{n} {status}" for status, n in counts.items())
        title = f"{self.total or len(known)} jobs: {told}; {clock(time.monotonic() - self._begun)}"
        table = Table(title=title, title_justify="left")
        for column in ("job", "status", "step", escape(self.monitor), "time"):
            table.add_column(column, justify="left" if column in ("job", "status") else "right")
        first = [e for e in known if e.status == "running"]
        last = [e for e in known if e.status not in ("running", "waiting")]
        rest = [e for e in known if e.status == "waiting"]
        shown = [*first, *last[-(_ROWS // 2) :], *rest][:_ROWS]
        for entry in shown:
            progress = progress_of(entry) if entry.status == "running" else {}
            value = progress.get(self.monitor) or entry.metrics.get(self.monitor)
            step = f"{progress['step']}/{progress['of']}" if progress else f"{entry.metrics.get('steps', 0):.0f}"
            status = f"[{_STYLES.get(entry.status, 'red')}]{entry.status}[/]"
            cells = (escape(name_of(entry)), status, step if entry.status != "waiting" else "")
            table.add_row(
                *cells, "" if value is None else f"{value:.5g}", clock(entry.seconds + running.get(entry.key, 0))
            )
        if len(known) > len(shown):
            table.caption = f"and {len(known) - len(shown)} more"
        return table


def progress_of(entry: Entry) -> dict[str, Any]:
    """How far a running job says it is."""
    try:
        content: dict[str, Any] = json.loads((Path(entry.run_dir) / ".progress.json").read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return {}


def name_of(entry: Entry) -> str:
    """A job in a line."""
    point = ", ".join(f"{key}={value}" for key, value in entry.point.items()) or Path(entry.run_dir).name
    return point if entry.trial is None else f"trial {entry.trial}: {point}"
