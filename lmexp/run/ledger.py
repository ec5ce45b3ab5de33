"""What has become of each job of a sweep: one small file a job, in the sweep's directory.

A job is known by what it computes, not by its number, so that a sweep that is started again, with a larger grid or by
another process, finds what is there. Whoever runs a job holds its lock, which ends with the process however that ends:
a job that is said to be running and whose lock is free was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from lmexp.contracts import UserError
from lmexp.run.directory import disk_errors, write_json

Status = Literal["waiting", "running", "done", "pruned", "diverged", "failed", "killed", "stopped"]

ENDED_WELL = ("done", "pruned")
"""A job with this status is not run again."""


@dataclass
class Entry:
    """One job."""

    key: str
    """What it computes, as a hash."""

    overrides: list[str]
    """The overrides that make it, those of the whole sweep among them."""

    point: dict[str, str]
    """What it does not share with all the others: key -> value, as text."""

    seed: int
    """Its seed."""

    run_dir: str
    """Where its run lies."""

    status: Status = "waiting"
    """waiting; running; done; pruned (stopped early by the search); diverged (a loss that is not finite); failed (an
    error); killed (ended from outside); stopped (by a signal, with a checkpoint saved)."""

    code: int = 0
    """Its exit code, once it has ended."""

    said: str = ""
    """Its error, in a line."""

    trial: int | None = None
    """Its number in the search, if there is one."""

    attempts: int = 0
    """Times it was started."""

    seconds: float = 0.0
    """Time of all attempts."""

    metrics: dict[str, float] = field(default_factory=dict)
    """What the run ended with."""


class Ledger:
    """The jobs of a sweep's directory."""

    def __init__(self, sweep_dir: Path | str) -> None:
        self.sweep_dir = Path(sweep_dir)
        self.path = self.sweep_dir / "ledger"

    def exists(self) -> bool:
        """Whether a sweep was begun here."""
        return self.path.is_dir()

    def read(self, key: str) -> Entry | None:
        """The job of this key, or None; a job whose runner was killed is told as that."""
        entry = self.read_file(key)
        if entry is not None and entry.status == "running" and not self.is_held(key):
            entry = self.read_file(key)  # it may have ended between the two looks
            if entry is not None and entry.status == "running":
                entry.status, entry.said = "killed", "ended together with what ran the sweep"
        return entry

    def read_file(self, key: str) -> Entry | None:
        """The same for whoever holds the job: just what the file says."""
        path = self.path / f"{key}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entry = Entry(**{f.name: content[f.name] for f in fields(Entry) if f.name in content})
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Remove it: the job is then run again, from its last checkpoint."
            ) from error
        entry.run_dir = str(self.sweep_dir / Path(entry.run_dir).name)  # the sweep's directory may have been moved
        return entry

    def entries(self) -> list[Entry]:
        """All jobs, in the order of their names."""
        found = [self.read(path.stem) for path in sorted(self.path.glob("*.json"))]
        return sorted((e for e in found if e is not None), key=lambda e: (e.trial or 0, e.run_dir))

    def write(self, entry: Entry) -> None:
        """Keep what is known of a job; atomic."""
        with disk_errors(self.path, "Writing the sweep's ledger"):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / f"{entry.key}.json", asdict(entry))

    def console(self, key: str) -> Path:
        """What the job printed."""
        return self.path / f"{key}.log"

    @contextmanager
    def held(self, key: str) -> Iterator[bool]:
        """Hold a job while it runs; False: another process does."""
        with disk_errors(self.path, "Writing the sweep's ledger"):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / f".{key}.lock")
        try:
            lock.acquire(timeout=0.3)  # one who only asks holds it for a moment
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_held(self, key: str) -> bool:
        """Whether a process runs the job now."""
        with self.held(key) as free:
            return not free


def key_of(content: Any) -> str:
    """Ten hex digits of what a job computes."""
    text = json.dumps(_with_text_keys(content), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _with_text_keys(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _with_text_keys(value) for key, value in node.items()}
    return [_with_text_keys(value) for value in node] if isinstance(node, list) else node
