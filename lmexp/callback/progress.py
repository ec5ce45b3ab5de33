"""How far a run is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lmexp.callback.base import RunCallback
from lmexp.contracts import UserError
from lmexp.run.terminal import clock


class Progress(RunCallback):
    """Shows steps, loss, tokens per second and the time left, and a line at each validation."""

    def __init__(self, lines_every: float) -> None:
        if lines_every < 1:
            raise UserError(f"callback.progress.lines_every={lines_every}; expected at least 1 second.")
        self.lines_every = lines_every
        self._bar: Bar | None = None
        self._last_line = self._noted = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self._last_line = time.monotonic()
        self._first = trainer.global_step
        if self.session.terminal.is_live:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
            )
            # redrawn by hand: a thread that redraws would take its share of the cores from training
            self._bar = Bar(*columns, console=self.session.terminal.console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("training", total=self.session.max_steps, told="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.session.log_every and step != self.session.max_steps:
            return
        if trainer.is_global_zero and time.monotonic() - self._noted >= 0.5:
            self._note(step)
        end = getattr(pl_module, "planned_steps", None) or self.session.max_steps  # as far as `max_time` will let it
        if self._bar is not None:
            told = self._told(step, end)
            self._bar.update(self._task, completed=step, total=end, told=told, description="training")
            self._bar.refresh()
        elif time.monotonic() - self._last_line >= self.lines_every:
            self._last_line = time.monotonic()
            self.session.terminal.print(f"step {step}/{end}  {self._told(step, end)}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="validating")
            self._bar.refresh()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        told = "  ".join(
            f"{tag} {value:.4f}"
            for tag, value in self.session.metrics.items()
            if tag.startswith("val/") and tag.count("/") == 1 and tag != "val/perplexity"
        )
        train = self.session.metrics.get("train/loss")
        told += "" if train is None else f"  train/loss {train:.4f}"
        self._last_line = time.monotonic()
        self._note(trainer.global_step)
        self.session.terminal.print(f"step {trainer.global_step}/{self.session.max_steps}  {told}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _note(self, step: int) -> None:
        """For whoever watches a sweep; a note that is lost is no harm."""
        path = self.session.progress
        if path is None:
            return
        self._noted = time.monotonic()
        values = {tag: value for tag, value in self.session.metrics.items() if tag.startswith(("val/", "train/loss"))}
        beside = path.with_suffix(".tmp")
        try:
            beside.write_text(json.dumps({"step": step, "of": self.session.max_steps, **values}), encoding="utf-8")
            os.replace(beside, path)
        except OSError:
            pass

    def _told(self, step: int, end: int) -> str:
        metrics = self.session.metrics
        done = step - self._first
        left = (time.monotonic() - self._begun) / max(1, done) * (end - step)
        if self.session.max_seconds is not None:  # the first steps are slow, and are no pace to tell the rest by
            left = min(left, max(0.0, self.session.max_seconds - self.session.seconds))
        speed = metrics.get("speed/tokens_per_second", 0.0)
        return f"loss {metrics.get('train/loss', float('nan')):.3f}  {speed:,.0f} tokens/s  {clock(left)} left"
