"""Steps that would spoil the weights: found before the update, on all devices alike, and recorded for `job=replay`."""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lmexp.callback.base import RunCallback
from lmexp.contracts import Batch, Diverged, UserError
from lmexp.data.loader import data_share
from lmexp.optimizer.sharding import norm_of
from lmexp.run import checkpoint as files
from lmexp.run.directory import write_json
from lmexp.run.pieces import pieces_of

_SETTLED = 20
"""Steps before the running average of the norm, or of the loss, says what is usual."""

_RATE = 0.05
"""Weight of a step in that average."""

_RECORDS = 10
"""Records that are kept of a run, each with the checkpoint before it."""

ADVICE = "Start again with a lower learning rate, a longer warm-up (schedule.warmup) or a lower task.clip_norm"


class Rollback(Exception):
    """The run is to go on from its last checkpoint, with the samples from `next_sample` on."""

    def __init__(self, step: int, next_sample: int, why: str, times: int = 1) -> None:
        """`times`: how often the run, over all of its processes, has gone back with this one."""
        super().__init__(why)
        self.step, self.next_sample, self.why, self.times = step, next_sample, why, times


class Guard(RunCallback):
    """Looks at each step's gradient norm, which is the same on all devices, and at its loss, before the weights are
    changed.

    Looking means waiting for the device. With the policy `raise` and no `spike` or `loss_spike` it is not done on GPUs:
    there the norms are read with everything else every `log_every` steps, and the run ends then.
    """

    def __init__(self, policy: str, spike: float | None, most: int, loss_spike: float | None = None) -> None:
        if policy not in ("raise", "skip", "rollback"):
            raise UserError(f"callback.guard.policy={policy}; expected raise, skip or rollback.")
        if spike is not None and not spike > 1:
            raise UserError(f"callback.guard.spike={spike}; expected a factor above 1, or null.")
        if loss_spike is not None and not loss_spike > 0:
            raise UserError(f"callback.guard.loss_spike={loss_spike}; expected nats above 0, or null.")
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise UserError(f"callback.guard.most={most}; expected a whole number of at least 1.")
        self.policy, self.spike, self.loss_spike, self.most = policy, spike, loss_spike, most
        self.skipped = self.in_a_row = 0
        self.rolled_back = 0
        """Times this run went back; whoever starts it again sets it."""
        self.watched: Any = None
        """Called with (batch, task, step, trainer) before each step is judged; of `job=replay`."""
        self._log_average = self._loss_average = 0.0
        self._seen = self._losses_seen = 0
        self._recent: list[float] = []
        self._recorded = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer, self._task = trainer, pl_module
        waits = self.policy != "raise" or self.spike is not None or self.loss_spike is not None
        if waits or self.watched is not None or trainer.strategy.root_device.type == "cpu":
            pl_module.accepts = self._accepts  # type: ignore[assignment]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.accepts = None  # type: ignore[assignment]

    def _accepts(self, batch: Batch, loss: Tensor, norm: Tensor) -> bool:
        """Whether the update is to be made. `loss` () is what this device adds to the mean over the batch's labels."""
        step = self._trainer.global_step
        if self.watched is not None:
            self.watched(batch, self._task, step, self._trainer)
        value = norm.item()
        mean = None if self.loss_spike is None else self._mean(loss)
        why = self._wrong_with(value, mean)
        if why is None:
            self._log_average += (math.log(max(value, 1e-30)) - self._log_average) * max(_RATE, 1 / (self._seen + 1))
            self._seen += 1
            if mean is not None:
                self._loss_average += (mean - self._loss_average) * max(_RATE, 1 / (self._losses_seen + 1))
                self._losses_seen += 1
            self.in_a_row = 0
            self._recent = [*self._recent[-4:], value]
            return True
        mean = self._mean(loss) if mean is None else mean  # all devices are here
        self._record(batch, step, mean, value, why)
        first, last = self._trainer.datamodule.span  # type: ignore[attr-defined]
        told = f"at step {step + 1} (samples {first} to {last}): {why}"
        if self.policy == "rollback" and self.rolled_back < self.most:
            times = int(self.session.metrics.get("guard/rolled_back", 0)) + 1
            raise Rollback(step, last + 1, told, times)
        self.in_a_row += 1
        if self.policy == "skip" and self.in_a_row <= self.most:
            self.skipped += 1
            self.session.left_out.add(step)
            self.session.metrics["guard/skipped"] = self.skipped
            self.session.terminal.print(f"Left out the update {told}.")
            return False
        raise Diverged(self.told(step, mean, value, why))

    def told(self, step: int, loss: float, norm: float, why: str) -> str:
        """The message of a run that ends here."""
        first, last = self._trainer.datamodule.span  # type: ignore[attr-defined]
        earlier = ", ".join(f"{n:.4g}" for n in self._recent) or "none"
        tried = {
            "raise": "",
            "skip": f" {self.in_a_row - 1} steps before it were left out.",
            "rollback": f" The run had gone back {self.rolled_back} times.",
        }[self.policy]
        folder = self.session.directory
        weights = norm_of(list(self._task.parameters())).item()
        return (
            f"Training diverged at step {step + 1}: {why}; loss {loss}, gradient norm {norm} (in the steps before: "
            f"{earlier}), norm of all weights {weights:.4g}. The batch was samples "
            f"{first} to {last}.{tried} Nothing was saved after that; the last good "
            f"checkpoint is in {folder.checkpoints}. {ADVICE}, or with callback.guard.policy=skip. Look into the step "
            f"with: python run.py job=replay ckpt={folder.path}"
        )

    def _mean(self, loss: Tensor) -> float:
        """The batch's mean loss, the same on all devices. Collective."""
        total, world = loss.detach().clone(), self._trainer.world_size
        if world > 1:  # over all, not the shares alone: those who hold one share must decide alike, to the last bit
            dist.all_reduce(total)
        return total.item() * data_share(self._trainer)[1] / world

    def _wrong_with(self, norm: float, loss: float | None) -> str | None:
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        usual = math.exp(self._log_average)
        if self.spike is not None and self._seen >= _SETTLED and norm > self.spike * usual:
            return f"the gradient's norm, {norm:.4g}, is {norm / usual:.3g} times the usual {usual:.4g}"
        if self.loss_spike is not None and loss is not None:
            if not math.isfinite(loss):
                return f"the loss is {loss}"
            above = loss - self._loss_average
            if above > self.loss_spike and self._losses_seen >= _SETTLED:
                return f"the loss, {loss:.4g}, is {above:.3g} above the usual {self._loss_average:.4g}"
        return None

    # ---- the record

    def _record(self, batch: Batch, step: int, loss: float, norm: float, why: str) -> None:
        folder = self.session.directory.flight
        rank, (share, shares) = self._trainer.global_rank, data_share(self._trainer)
        back = f"-back{self.rolled_back}" if self.rolled_back else ""
        name = f"step-{step:09d}{back}" + (f".rank{rank}" if rank else "")
        folder.mkdir(parents=True, exist_ok=True)
        self._recorded += 1
        if self._recorded > _RECORDS:  # counted, not looked up: all devices must decide alike
            return
        data: Any = self._trainer.datamodule  # type: ignore[attr-defined]
        first, last = data.span
        size = last + 1 - first
        layers = {}
        for part, p in self._task.named_parameters():  # all devices take part where these are in pieces
            gradient = 0.0 if p.grad is None else norm_of([p.grad], [p]).item()
            layers[part] = {"weight_norm": norm_of([p]).item(), "summed_grad_norm": gradient}
        kept = self._keep_checkpoint(step) if rank == 0 else None
        content = {
            "step": step,
            "why": why,
            "policy": self.policy,
            "loss": loss,
            "grad_norm": norm,
            "grad_norms_before": self._recent,
            "learning_rates": {g["name"]: g["lr"] for g in self._trainer.optimizers[0].param_groups},
            "from_sample": data.from_sample,
            "samples": [first + share * size // shares, first + (share + 1) * size // shares - 1],
            "checkpoint": kept,
            "texts": texts_of(batch, data.tokenizer),
            "layers": layers,
        }
        write_json(folder / f"{name}.json", content)

    def _keep_checkpoint(self, step: int) -> str | None:
        """Hold on to the checkpoint that the step can be reached from."""
        directory = self.session.directory
        saved = [s for s in files.saved_steps(directory.checkpoints) if s <= step]
        if not saved:
            return None
        name = files.step_file(saved[-1])
        if not (directory.flight / name).exists():
            for file in (*pieces_of(directory.checkpoints / name), directory.checkpoints / name):
                kept = directory.flight / file.name
                kept.unlink(missing_ok=True)  # of an attempt that was killed
                try:
                    os.link(file, kept)
                except OSError:  # a file system without hard links, or the file has just made way for a later one
                    if not file.exists():
                        return None
                    shutil.copy2(file, kept)
        return name

    # ---- what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "average": self._log_average,
            "seen": self._seen,
            "loss_average": self._loss_average,
            "losses_seen": self._losses_seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._log_average, self._seen = state_dict["average"], state_dict["seen"]
        self._loss_average = state_dict.get("loss_average", 0.0)  # a checkpoint from before has none
        self._losses_seen = state_dict.get("losses_seen", 0)


def texts_of(batch: Batch, tokenizer: Any) -> list[str]:
    """What the model read, row by row, padding left out."""
    inputs = batch["inputs"]
    name = next((n for n in ("tokens", "decoder_tokens") if n in inputs), None)
    if name is None:
        return []
    rows = inputs[name].tolist()
    padding = inputs.get(name.replace("tokens", "documents"))
    if padding is not None:
        rows = [
            [token for token, text in zip(*both, strict=True) if text >= 0]
            for both in zip(rows, padding.tolist(), strict=True)
        ]
    return [tokenizer.decode(row)[:2000] for row in rows]
