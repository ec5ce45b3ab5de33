"""When a run is saved, stopped and resumed: always between two steps, after the validation that is due there."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils._pytree import tree_map_only

from lmexp.callback.base import RunCallback
from lmexp.callback.tracking import Tracking
from lmexp.contracts import Interrupted, StorageError, UserError
from lmexp.data.loader import data_share
from lmexp.run import checkpoint as files
from lmexp.run.pieces import read
from lmexp.run.signals import SIGNALS, TWICE_S

_PACED = 5
"""Steps after which the pace of a run with `max_time` is known well enough to plan by."""


class CheckpointFiles(CheckpointIO):
    """Lightning's way to our checkpoint files: atomic when written, verified when read.

    With `background` a copy of everything is made at once, and written while training goes on; one at a time.
    """

    def __init__(self) -> None:
        self.background = False
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.read: dict[str, dict[str, Any]] = {}
        """Checkpoints that were read and verified already, by their path."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not self.background:
            files.save(checkpoint, Path(path))
            return
        self.wait()
        copied = tree_map_only(torch.Tensor, _copied, checkpoint)
        self._writing = self._writer.submit(files.save, copied, Path(path))

    def after(self, do: Callable[[], None]) -> None:
        """Do this when what was saved last is on the disk."""
        if self._writing is None:
            do()
            return
        self._writing = self._writer.submit(_then, self._writing, do)  # in turn: the writer is one thread

    def wait(self) -> None:
        """Until everything is on the disk. Raises what went wrong in writing it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether writing has gone wrong by now."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(self.load_unread(path))

    def load_unread(self, path: Any) -> dict[str, Any]:
        """Tensors in pieces are read when they are asked for."""
        known = self.read.pop(str(path), None)
        return files.load(path, whole=False) if known is None else known

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoint(RunCallback):
    """Saves at multiples of `every_steps`, by time, when validation got better, at the end and on a signal.

    It must be the last callback: what it saves is the state after everything else that happens at a step.
    """

    def __init__(
        self,
        every_steps: int | None,
        every_minutes: float | None,
        keep: int,
        monitor: str,
        mode: str,
        background: bool = False,
        sharded: bool = False,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"callback.checkpoint.{name}={value}; expected a positive number, or null.")
        if not isinstance(keep, int) or keep < 1:
            raise UserError(f"callback.checkpoint.keep={keep}; expected a whole number of at least 1.")
        if mode not in ("min", "max"):
            raise UserError(f"callback.checkpoint.mode={mode}; expected min or max.")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = keep
        if not isinstance(background, bool):
            raise UserError(f"callback.checkpoint.background={background}; expected true or false.")
        if not isinstance(sharded, bool):
            raise UserError(f"callback.checkpoint.sharded={sharded}; expected true or false.")
        if sharded and background:
            raise UserError(
                "callback.checkpoint.sharded=true with callback.checkpoint.background=true: a checkpoint in pieces is "
                "written by all processes together, at once; set one of them to false."
            )
        self.background = background
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._files = CheckpointFiles()
        self._signal: int | None = None
        self._signalled = 0.0
        self._handlers: dict[int, Any] = {}
        self._random: list[dict[str, Any]] = []
        self._votes: Any = None
        self._pace_from: tuple[int, float] | None = None
        self._planned: int | None = None

    # ---- what happens at a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        assert isinstance(trainer.strategy.checkpoint_io, CheckpointFiles)
        self._files = trainer.strategy.checkpoint_io
        self._files.background = self.background
        pl_module.planned_steps = self._planned if self.session.max_seconds is not None else None  # type: ignore[assignment]
        if self._random:
            share = data_share(trainer)[0]
            if share < len(self._random):
                _set_random_state(self._random[share])
            self._random = []  # a rank that was not there before keeps what its seed gave it
        if trainer.world_size > 1:
            # the processes agree through the CPU, so that no step waits for a GPU
            self._votes = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
            self._refuse_other_beginnings(trainer)
        if threading.current_thread() is threading.main_thread():
            # here, because Lightning has set its own by now
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _refuse_other_beginnings(self, trainer: Trainer) -> None:
        """Raise `StorageError` unless all processes go on from the same step and sample: each has looked for the last
        checkpoint by itself."""
        own = torch.tensor([trainer.global_step, trainer.datamodule.samples_seen])  # type: ignore[attr-defined]
        all_of_them = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(all_of_them, own, group=self._votes)
        steps, samples = torch.stack(all_of_them).T.tolist()
        if len(set(zip(steps, samples, strict=True))) > 1:
            raise StorageError(
                f"The processes go on from different places, after the steps {steps} and the samples {samples}: they "
                f"do not see the same files in {self.session.directory.checkpoints}. Put the run on a disk that all "
                "machines share, wait until its writes are seen everywhere, and start the same command again."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        first, last = data.span
        data.advance(last + 1 - first)
        limit = self.session.max_seconds
        minutes = self.every_minutes
        if limit is not None:
            self._plan_for(limit, trainer, pl_module)
        stopped, out_of_time, save_now, failed = self._agree(
            self._signal is not None,
            limit is not None and self.session.seconds >= limit,
            minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes,
            self._files.failed,
        )
        if failed:
            self._files.wait()  # raises on the rank that writes
            raise StorageError("Another process could not write a checkpoint; it says why.")
        if step == self.session.max_steps or (out_of_time and not stopped):
            trainer.should_stop = True  # Lightning validates before it stops
        due = save_now or (self.every_steps is not None and step % self.every_steps == 0)
        self._stop_after, self._save_after = stopped, due
        if not (trainer.should_stop or step % self.session.validate_every == 0):
            self._end_of_step(trainer, pl_module, validated=False)

    def _plan_for(self, limit: float, trainer: Trainer, task: Any) -> None:
        """Fit the schedule into the time there is, at the pace so far, validation and saving included."""
        step, now = trainer.global_step, self.session.seconds
        if self._pace_from is None:
            self._pace_from = step, now  # the first step warms up
        first, start = self._pace_from
        if step - first < _PACED:
            return
        left = torch.tensor((limit - now) / ((now - start) / (step - first)))
        if self._votes is not None:
            dist.broadcast(left, 0, group=self._votes)  # all use one clock
        self._planned = min(self.session.max_steps, max(step + 1, step + int(left.item())))
        task.planned_steps = self._planned

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._end_of_step(trainer, pl_module, validated=True)

    def _end_of_step(self, trainer: Trainer, task: LightningModule, validated: bool) -> None:
        better, stop = False, self._stop_after
        if validated:  # devices that share out a model measure by themselves, to the last bit or nearly so
            stop, better, ends = self._agree(self._signal is not None, self._is_better(), trainer.should_stop)
            trainer.should_stop = ends
        at_validations = validated and self.every_steps is None
        if better or stop or self._save_after or at_validations or trainer.should_stop:
            with self.session.pause():
                self._save(trainer, task, better)
        if stop or trainer.should_stop:
            self._files.wait()
        if stop and not (trainer.should_stop and validated):  # at the very end the run is done, not stopped
            name = signal.Signals(self._signal).name if self._signal is not None else "a signal to another process"
            raise Interrupted(
                f"by {name} after step {trainer.global_step}, with a checkpoint saved. Go on with: "
                f"resume=auto paths.run_dir={self.session.directory.path}"
            )

    def _is_better(self) -> bool:
        score = self.session.metrics.get(self.monitor)
        if score is None:
            raise UserError(
                f"callback.checkpoint.monitor={self.monitor} is not measured; expected one of "
                f"{', '.join(sorted(t for t in self.session.metrics if t.startswith('val/')))}."
            )
        return self.best_score is None or self.sign * score < self.sign * self.best_score

    def _save(self, trainer: Trainer, task: LightningModule, is_best: bool) -> None:
        step = trainer.global_step
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Tracking):
                callback.flush(trainer, task)  # raises for a loss that is not finite, before it is saved
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.flush()  # what a checkpoint is resumed from must stand in the curves
        if is_best:
            self.best_score, self.best_step = self.session.metrics[self.monitor], step
        folder = self.session.directory.checkpoints
        trainer.save_checkpoint(folder / files.step_file(step))
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            self._files.after(partial(_link_and_tidy, folder, step, self.best_step, self.keep))

    # ---- signals and votes

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:  # a second one: at once, unless it is the same by another way
            if number == self._signal and time.monotonic() - self._signalled < TWICE_S:
                return
            raise KeyboardInterrupt
        self._signal, self._signalled = number, time.monotonic()
        self.session.terminal.print(f"{signal.Signals(number).name}: saving at the end of this step.")

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any process raised each flag. Collective."""
        if self._votes is None:
            return flags
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._votes)
        return tuple(bool(vote) for vote in votes.tolist())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if isinstance(exception, Exception) and not self._files.failed:
            self._files.wait()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # ---- what a checkpoint holds

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        step = trainer.global_step
        states = [_random_state()]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(states, _random_state())
            states = states[:: trainer.world_size // data_share(trainer)[1]]  # those that read the same have the same
        _between_steps(checkpoint["loops"]["fit_loop"], step, self.session.validate_every)
        checkpoint["lmexp"] = {
            **self.session.record,
            "format": files.FORMAT,
            "step": step,
            "planned_steps": self._planned,
            "seconds": self.session.seconds,
            "stopped_early": self.session.stopped_early,
            "metrics": dict(self.session.metrics),
            "best": {"score": self.best_score, "step": self.best_step},
            "random": states,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = checkpoint["lmexp"]
        self.best_score, self.best_step = entry["best"]["score"], entry["best"]["step"]
        best = None if self.best_step is None else self.session.directory.checkpoints / files.step_file(self.best_step)
        if best is not None and not best.exists():  # a later one took its place, and is damaged
            self.best_score = self.best_step = None
        self._random = entry["random"]
        self._planned = entry.get("planned_steps")


def _link_and_tidy(folder: Path, step: int, best: int | None, keep: int) -> None:
    files.link_last_and_best(folder, step, best)
    for old in files.saved_steps(folder)[:-keep]:
        if old not in (step, best):
            files.remove(folder / files.step_file(old))


def _then(written: Future[None], do: Callable[[], None]) -> None:
    written.result()
    do()


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", copy=True)


def _between_steps(loop: dict[str, Any], step: int, validate_every: int) -> None:
    """Make Lightning's record of its loop say: `step` batches are done, and so is the validation due there.

    As saved from inside a hook it says that the batch, or the validation, is under way, and would run that again.
    """
    done = {"ready": step, "started": step, "processed": step, "completed": step}
    loop["epoch_loop.batch_progress"] |= {"total": dict(done), "current": dict(done), "is_last_batch": False}
    progress = loop["epoch_loop.manual_optimization.optim_step_progress"]
    progress |= {"total": {"ready": step, "completed": step}, "current": {"ready": step, "completed": step}}
    # where a validation was due, Lightning counts this batch again on its way past it
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - (step % validate_every == 0)
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loop["epoch_progress"] |= {"total": dict(epoch), "current": dict(epoch)}
    nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    loop["epoch_loop.val_loop.batch_progress"] |= {"total": dict(nothing), "current": dict(nothing)}


def _random_state() -> dict[str, Any]:
    """Of Python, NumPy, torch and CUDA, as tensors and plain containers."""
    version, numbers, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
