"""Callbacks that know the run they serve."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from rich.table import Table

from lmexp.run.session import Session


class RunCallback(Callback):
    """The training job sets `session` before the fit."""

    session: Session


class Scoring(RunCallback):
    """Looks at what a model makes of single examples of a split, in validation and when a checkpoint is tested.

    The job sets `data` and `sampling`, and before a test `split` and `most`, how many examples of each part.
    """

    data: Any
    sampling: Any
    split = "test"
    most: int | None = None

    shown: int
    """Examples in `table`."""

    signature: str | None = None
    """How the scores are counted, for papers; None: as their names say."""

    measured: dict[str, float]
    """What it measured itself over the last split, besides the task."""

    def table(self) -> Table:
        """Some telling examples, for the terminal."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """Every example of the last split with what was made of it, in the split's order."""
        raise NotImplementedError
