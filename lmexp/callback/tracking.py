"""What TensorBoard shows of a run's training, read from the device once every `log_every` steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, cast

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lmexp.callback.base import RunCallback
from lmexp.callback.guard import ADVICE
from lmexp.contracts import Diverged, MeasuredTask, StepRecord, UserError
from lmexp.optimizer.sharding import norm_of
from lmexp.run import events

_RATIO_ELEMENTS = 2**24
"""The update-to-weight ratio is measured on the first parameters with so many numbers together (64 MiB): a copy of
all weights of a large model would not fit beside it."""


class EventFiles(TensorBoardLogger):
    """Lightning's TensorBoard logger, less its own file of hyperparameters: config.yaml is that."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All of a step as one event: each that is written wakes the writer's thread, at the cost of the step's."""
        events.add_scalars(self.experiment, metrics, step or 0)

    def save(self) -> None:
        self.experiment.flush()


class Tracking(RunCallback):
    """Logs each step's loss and gradient norm, and for each window of steps the rest.

    Steps count from 1: the value at step s belongs to the s-th update. Raises `UserError` for a loss or gradient
    that is not finite, before anything is saved.
    """

    def __init__(self, update_ratio_every: int) -> None:
        if update_ratio_every < 1:
            raise UserError(f"callback.tracking.update_ratio_every={update_ratio_every}; expected at least 1.")
        self.update_ratio_every = update_ratio_every
        self._before: list[Tensor] = []
        self._ratio: Tensor | None = None
        self._steps = self._tokens = 0  # of all windows but the first, which warms up
        self._spent = 0.0
        self._norms = "none yet"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spans: dict[int, tuple[int, int]] = {}  # step of the window -> first and last sample of its batch
        self.session.start_clock()
        self._window_start = self._left = time.perf_counter()
        self._paused = self._paused_when_left = self.session.paused
        self._waited = 0.0
        if trainer.global_step == 0 and isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            for tag, text in self.session.texts.items():
                trainer.logger.experiment.add_text(tag, text, 0)
            events.start_hparams(trainer.logger.experiment, self.session.hparams, self.session.shown)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # since the last step's end, less validation, samples and saving
        self._waited += time.perf_counter() - self._left - (self.session.paused - self._paused_when_left)
        self._spans[trainer.global_step] = trainer.datamodule.span  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % self.update_ratio_every == 0:
            self._before = [p.detach().clone() for p in _measured(pl_module)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before:
            self._ratio = _update_ratio(self._before, _measured(pl_module))
            self._before = []
        if trainer.global_step % self.session.log_every == 0 or trainer.global_step == self.session.max_steps:
            self.flush(trainer, pl_module)
        self._left, self._paused_when_left = time.perf_counter(), self.session.paused

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.session.paused += time.perf_counter() - self._validation_start
        for tag, value in trainer.callback_metrics.items():
            if tag.startswith("val/"):
                self.session.metrics[tag] = float(value)
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.state.fn == "fit":
            drawn = {f"data/drawn/{part}": n for part, n in trainer.datamodule.drawn().items()}  # type: ignore[attr-defined]
            if drawn:
                trainer.logger.log_metrics(drawn, step=trainer.global_step)
        loss = self.session.metrics.get("val/loss", 0.0)
        if trainer.state.fn == "fit" and not math.isfinite(loss):
            raise Diverged(
                f"Training diverged: the validation loss after step {trainer.global_step} is {loss}, gradient norms "
                f"before: {self._norms}, norm of all weights {_size(pl_module):.4g}. Nothing was saved after that; the "
                f"last good checkpoint is in {self.session.directory.checkpoints}. {ADVICE}."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            events.end_hparams(trainer.logger.experiment)

    def flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read and log what the steps since the last call measured. Collective."""
        step = trainer.global_step
        task = cast(MeasuredTask, pl_module)
        record = task.read_window(step)
        if not record.steps:
            return
        self._refuse_nan(record, pl_module)
        self._spans = {}
        now = time.perf_counter()
        spent = now - self._window_start - (self.session.paused - self._paused)
        values = self._window_values(trainer, task, record, spent)
        if record.steps[0] > self.session.steps_before:
            self._steps += len(record.steps)
            self._tokens += sum(record.positions)
            self._spent += spent
            self.session.metrics["speed/mean_step_ms"] = 1000 * self._spent / self._steps
            self.session.metrics["speed/mean_tokens_per_second"] = self._tokens / self._spent
        self.session.metrics.update(values)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in values.items()})
        if trainer.logger is not None and trainer.is_global_zero:
            for at, loss, norm in zip(record.steps, record.loss, record.grad_norm, strict=True):
                own = {"train/loss": loss, "optim/grad_norm": norm}
                shared = {k: v for k, v in values.items() if k != "train/loss"} if at + 1 == step else {}
                trainer.logger.log_metrics(own | shared, step=at + 1)
        self._window_start, self._paused, self._waited = now, self.session.paused, 0.0
        self._norms = ", ".join(f"{norm:.4g}" for norm in record.grad_norm[-5:])

    def _window_values(
        self, trainer: Trainer, task: MeasuredTask, record: StepRecord, spent: float
    ) -> dict[str, float]:
        made = [n for n, step in enumerate(record.steps) if step not in self.session.left_out]
        nats = sum(record.loss[n] * record.tokens[n] for n in made)
        tokens, n_bytes = sum(record.tokens[n] for n in made), sum(record.n_bytes[n] for n in made)
        loss = nats / tokens if tokens else math.nan
        values = {"train/loss": loss}
        if self.session.bits:  # else it is no loss of tokens
            values["train/perplexity"] = math.exp(min(loss, 700))
        if n_bytes and self.session.bits:
            values[f"train/{self.session.bits}"] = nats / math.log(2) / n_bytes
        optimizer = trainer.optimizers[0]
        for number, group in enumerate(optimizer.param_groups):
            if number == 0:
                values["optim/lr"] = group["lr"]
            values[f"optim/lr_{group['name']}"] = group["lr"]
        if self._ratio is not None:
            values["optim/update_ratio"] = self._ratio.item()
            self._ratio = None
        values |= {tag: n for tag, n in self.session.metrics.items() if tag.startswith("guard/")}
        read = sum(record.positions)
        values["speed/tokens_per_second"] = read / spent
        values["speed/step_ms"] = 1000 * spent / len(record.steps)
        values["speed/data_wait"] = self._waited / spent
        values["speed/tokens"] = self.session.metrics.get("speed/tokens", 0) + read
        if self.session.peak_flops is not None:
            values["speed/mfu"] = task.flops_per_token * read / spent / self.session.peak_flops
        device = trainer.strategy.root_device
        if device.type == "cuda":
            values["memory/gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            values["memory/gib"] = psutil.Process().memory_info().rss / 2**30
        return values

    def _refuse_nan(self, record: StepRecord, task: LightningModule) -> None:
        for place, (step, loss, norm) in enumerate(zip(record.steps, record.loss, record.grad_norm, strict=True)):
            if (math.isfinite(loss) and math.isfinite(norm)) or step in self.session.left_out:
                continue
            earlier = ", ".join(f"{n:.4g}" for n in record.grad_norm[max(0, place - 5) : place]) or "not in this window"
            first, last = self._spans[step]
            raise Diverged(
                f"Training diverged at step {step + 1}: loss {loss}, gradient norm {norm} (in the steps before: "
                f"{earlier}), norm of all weights by now {_size(task):.4g}. The batch was samples {first} to "
                f"{last}. Nothing was saved after that; the last good checkpoint is in "
                f"{self.session.directory.checkpoints}. {ADVICE}."
            )


def _size(task: LightningModule) -> float:
    """Norm of all weights together. Collective where they are in pieces."""
    return norm_of(list(task.parameters())).item()


def _measured(task: LightningModule) -> list[Tensor]:
    taken: list[Tensor] = []
    count = 0
    for p in task.parameters():
        if p.requires_grad and count + p.numel() <= _RATIO_ELEMENTS:
            taken.append(p)
            count += p.numel()
    return taken


@torch.no_grad()
def _update_ratio(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """||w' - w|| / ||w|| over all of these together."""
    return norm_of([b - a for a, b in zip(before, after, strict=True)], after) / norm_of(before, after)
