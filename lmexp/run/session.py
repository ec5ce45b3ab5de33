"""What one process run of a training shares: where it writes, what it keeps in checkpoints, its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmexp.run.directory import RunDirectory
from lmexp.run.terminal import Terminal


@dataclass
class Session:
    """Made by the training job, given to the callbacks."""

    directory: RunDirectory
    """Where the run lies."""

    terminal: Terminal
    """Where it speaks."""

    record: dict[str, Any]
    """What every checkpoint holds unchanged: the configuration, the tokenizer, the fingerprint of the data."""

    max_steps: int
    """Optimizer steps of the whole run."""

    validate_every: int
    """Steps between validations."""

    log_every: int
    """Steps between reads of what the steps measured."""

    use: tuple[str, str] | None
    """What the model is for and the overrides that do it, for the last line; None: nothing."""

    shown: tuple[str, ...]
    """The tags that HPARAMS shows of the run."""

    bits: str | None
    """What nats over bytes are called, from the objective; None: they mean nothing."""

    peak_flops: float | None
    """FLOP/s that all devices together can do at most; None where that is not known."""

    max_seconds: float | None = None
    """Training time after which the run ends; None: no limit."""

    progress: Path | None = None
    """Where to note how far the run is, for whoever watches; None: nobody does."""

    texts: dict[str, str] = field(default_factory=dict)
    """Tag -> Markdown that TensorBoard shows as text."""

    hparams: dict[str, Any] = field(default_factory=dict)
    """What HPARAMS compares runs by."""

    steps_before: int = 0
    """Steps that earlier sessions of the run took."""

    seconds_before: float = 0.0
    """Seconds that they took."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Tag -> the latest number, for the terminal and metrics.json."""

    left_out: set[int] = field(default_factory=set)
    """Steps, counted from 0, whose update was not made."""

    stopped_early: bool = False
    """Whether the run has ended before its last step because it no longer got better."""

    paused: float = 0.0
    """Seconds so far in which no training was done: validation, samples, saving."""

    _started: float = field(default_factory=time.perf_counter)

    def start_clock(self) -> None:
        """Training begins now."""
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since training began, earlier sessions included, everything included."""
        return self.seconds_before + time.perf_counter() - self._started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count for the speed of training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start
