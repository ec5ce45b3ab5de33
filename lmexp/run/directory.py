"""A run's directory: `logs/<experiment>/<run id>/` and what stands in it."""

from __future__ import annotations

import errno
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from lmexp.contracts import StorageError, UserError


def new_run_id() -> str:
    """A name that sorts by time: UTC time to the second and 8 random hex digits, so that two do not collide."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(4)


class NoAccess(UserError):
    """A place that may not be written to."""

    def __init__(self, doing: str, path: Path | str, reason: str | None) -> None:
        super().__init__(
            f"{doing}: cannot write to {path} ({reason}). Give a directory that you may write to, for example "
            "paths.run_dir=logs/mine."
        )
        self.doing, self.path, self.reason = doing, Path(path), reason


@contextmanager
def disk_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turn a disk that is full or gone, or a missing permission, into a `UserError` that says what to do.

    Other errors of the operating system pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{doing}: the disk that holds {path} is full ({error.strerror}). Nothing half-written was kept. "
                "Free some space or set paths.run_dir (or paths.cache_dir) to another disk, then run again with "
                "resume=auto."
            ) from error
        if error.errno in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN):
            raise StorageError(
                f"{doing}: {path} cannot be reached any more ({error.strerror}): its disk or network mount failed. The "
                "last whole checkpoint is as it was; when the disk is back, run again with resume=auto."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise NoAccess(doing, path, error.strerror) from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one whole, whatever happens in between."""
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path, f"Writing {path.name}"):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class RunDirectory:
    """The layout of one run; nothing is touched until `open`."""

    path: Path
    """The directory itself."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def flight(self) -> Path:
        return self.path / "flight"

    @property
    def progress(self) -> Path:
        return self.path / ".progress.json"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    def holds_run(self) -> bool:
        """Whether a run was started here before."""
        return self.config.exists() or any(self.checkpoints.glob("step-*.ckpt"))

    def refuse_if_taken(self, resume: Literal["never", "auto"]) -> None:
        """Raise `UserError` if a run is here and `resume` is "never", or if event files of something else are here."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"paths.run_dir={self.path} is a file; expected a directory or a path that is free.")
        if resume == "never" and self.holds_run():
            raise UserError(
                f"paths.run_dir={self.path} already holds a run, and resume=never would overwrite it. "
                "Go on with that run by resume=auto, or choose another paths.run_dir."
            )

        if not self.holds_run() and any(self.path.glob("events.out.tfevents.*")):
            raise UserError(
                f"paths.run_dir={self.path} holds TensorBoard's files of something that is no run of lmexp. Choose a "
                "directory of its own."
            )

    @contextmanager
    def open(self) -> Iterator[RunDirectory]:
        """Make the directory and hold it: a second process that wants to write the same run is refused.

        The lock is the operating system's: it ends with the process, however that ends. If what ends the block comes
        before a run was begun here (config.yaml), what this call made goes again.
        """
        made = [p for p in [self.path, *self.path.parents] if not p.exists()]
        with disk_errors(self.path, "Making the run's directory"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"paths.run_dir={self.path} is being written by another process. Wait for it, stop it, "
                    "or choose another paths.run_dir."
                ) from None
        try:
            yield self
        except BaseException:
            if not self.holds_run():
                self._remove_what_was_made(made)
            raise
        finally:
            lock.release()

    @contextmanager
    def losses(self) -> Iterator[None]:
        """While it is open, not being allowed to write here any more is a loss of the disk, not a mistake."""
        try:
            yield
        except NoAccess as error:
            if self.path not in (error.path, *error.path.parents):
                raise
            raise StorageError(
                f"{error.doing}: {error.path} cannot be written any more ({error.reason}). The last whole checkpoint "
                f"is as it was; when it can be written again, go on with resume=auto paths.run_dir={self.path}"
            ) from error

    def _remove_what_was_made(self, made: list[Path]) -> None:
        for child in (self.checkpoints, self.path / ".lock", self.log):
            if child.is_dir():
                if not any(child.iterdir()):
                    child.rmdir()
            else:
                child.unlink(missing_ok=True)
        for directory in made:  # from the innermost outwards
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of one JSON object a line atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
