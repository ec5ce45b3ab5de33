"""What a run says: to the terminal, and the same to run.log."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from rich.console import Console

from lmexp.run.directory import disk_errors

_LOG_WIDTH = 120


class Terminal:
    """Prints to standard output and, once it has one, to a log file; silent on all ranks but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self.is_quiet = quiet
        self._file: IO[str] | None = None
        self._log: Console | None = None

    @property
    def is_live(self) -> bool:
        """Whether somebody may be looking: a progress bar makes sense."""
        return self.console.is_terminal and not self.is_quiet

    def open_log(self, path: Path) -> None:
        """Append everything printed from now on to this file too."""
        if self.is_quiet:
            return
        with disk_errors(path, "Opening run.log"):
            self._file = path.open("a", encoding="utf-8")
        self._log = Console(file=self._file, width=_LOG_WIDTH, highlight=False, no_color=True)

    def print(self, *content: Any) -> None:
        """Print text (with rich's markup) or anything that rich can show."""
        self.console.print(*content, soft_wrap=all(isinstance(c, str) for c in content))
        if self._log is not None and self._file is not None:
            self._log.print(*content, soft_wrap=all(isinstance(c, str) for c in content))
            self._file.flush()

    def close(self) -> None:
        """Close the log file."""
        if self._file is not None:
            self._file.close()
        self._file = self._log = None


def clock(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
