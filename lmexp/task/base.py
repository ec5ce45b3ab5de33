"""The training step that all tasks share: exact over micro-batches and devices, cheap to log."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lmexp.contracts import IGNORE_INDEX, Batch, Schedule, StepRecord, UserError
from lmexp.data.loader import data_group, data_share, each_tensor
from lmexp.model.lora import LoRA, add_lora
from lmexp.optimizer.sharding import norm_of, recompute_activations, scale_, shard
from lmexp.optimizer.tensor_parallel import TensorParallel
from lmexp.task.sharded import Sharded

OptimizerBuilder = Callable[[nn.Module], torch.optim.Optimizer]


class BaseTask(LightningModule):
    """One Lightning batch is one optimizer step on the whole local batch, split here into micro-batches.

    A subclass says what the loss of a micro-batch is (`loss_sum`) and how to validate. The gradient is that of
    sum(loss) / count over the global batch: counts are added over micro-batches and devices before the division,
    so the numbers do not depend on how the batch is split. Steps run without reading from the device; what they
    measure stands in a ring of `log_every` entries until `read_window`.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Any,
        optimizer: OptimizerBuilder,
        schedule: Schedule,
        max_steps: int,
        clip_norm: float | None,
        micro_batch_size: int | None,
        log_every: int,
        flops_per_token: float,
        freeze: Sequence[str] = (),
        lora: Mapping[str, Any] | None = None,
        compile: bool = False,
        recompute: bool = False,
    ) -> None:
        """`freeze`: parts of the model that are not trained, as names of modules or parameters, or patterns of these
        (`embed`, `blocks.[0-3]`). `lora`: the fields of `LoRA`, which alone is trained then, after `adapt`.
        `recompute`: activations of blocks are computed again in the backward pass instead of being kept."""
        super().__init__()
        if lora is not None and freeze:
            raise UserError(f"task.freeze={list(freeze)} with task.lora, which freezes all but itself; leave one out.")
        self.lora = None if lora is None else LoRA.of(lora)
        if clip_norm is not None and clip_norm <= 0:
            raise UserError(f"task.clip_norm={clip_norm}; expected a positive norm, or null for no clipping.")
        freeze_parts(model, freeze)
        self.automatic_optimization = False
        self._metric = (metric,)  # no submodule: with half-precision weights its sums would be halved too
        self.measured: dict[str, float] = {}
        """What the last pass over a split gave, with `tokens`, how many labels were scored."""
        self.model = model
        self.build_optimizer = optimizer
        self.schedule = schedule
        self.max_steps = max_steps
        self.clip_norm = clip_norm
        self.micro_batch_size = micro_batch_size
        self.log_every = log_every
        self.flops_per_token = flops_per_token
        self.planned_steps: int | None = None
        """Steps that there is time for, if that is less than `max_steps`; the schedule ends with them."""
        self.accepts: Callable[[Batch, Tensor, Tensor], bool] | None = None
        """Asked with the batch, the mean loss () and the gradient's norm () whether to make the update."""
        self._window_start = 0
        self._ring: Tensor | None = None
        if recompute:
            recompute_activations(self.model)
        if compile:
            # in place: a wrapper would prefix every key of the state dict with _orig_mod
            self.model.compile()
            self.model.head.compile()  # type: ignore[union-attr]

    def adapt(self, seed: int) -> None:
        """Put in the adapters that `lora` asks for; once, when the weights that they adapt are there."""
        if self.lora is not None:
            add_lora(self.model, self.lora, seed)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed loss () of a micro-batch over its scored positions."""
        raise NotImplementedError

    @property
    def metric(self) -> Any:
        """What is kept of a split."""
        return self._metric[0]

    def measure(self, final: bool) -> dict[str, float]:
        """What the metric says of the split, of all devices; `final`: a test, not a validation while training."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        self.metric.to(self.device)
        self.metric.reset()
        self.metric.process_group = data_group(self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Write the numbers of the split under val/, against the optimizer step."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # the head's group stays whole after a forward pass without a backward one
        self.measured = self.measure(final=False)  # while the devices are still connected
        values = {f"val/{name}": value for name, value in self.measured.items() if name != "tokens"}
        self.trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
        if self.logger is not None and self.trainer.state.fn == "fit":
            self.logger.log_metrics(values, step=self.trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self.measured = self.measure(final=True)

    @property
    def _parallel(self) -> TensorParallel | None:
        return getattr(self.model, "tensor_parallel", None)

    def configure_model(self) -> None:
        """Put the model in pieces, if the strategy is for that."""
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded) and not isinstance(self.model, FSDPModule):
            shard(self.model, strategy.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self._parallel is not None:
            self._parallel.mark()  # parameters that have come to another device since may be new ones
        return self.build_optimizer(self.model)

    def on_train_start(self) -> None:
        self._window_start = self.trainer.global_step
        self._ring = torch.zeros(self.log_every, 5, dtype=torch.float32, device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step: backward over the micro-batches, mean gradient, clip, update."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        step = self.trainer.global_step
        factor = self._factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        count = (batch["labels"] != IGNORE_INDEX).sum()
        shares = data_share(self.trainer)[1]
        if shares > 1:
            dist.all_reduce(count, group=data_group(self.trainer))
        micro_batches = list(split_batch(batch, self.micro_batch_size))
        # the dtypes are said: where weights are half-precision, so is the default
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, micro in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with nullcontext() if last else self._no_sync():
                loss = self.loss_sum(micro)
                self.manual_backward(loss)
            total += loss.detach().float()

        if self._parallel is not None:
            self._parallel.sum_gradients()
        trained = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        # backends average over the shares of the batch, which is taken back
        scale = shares / count.float()
        norm = norm_of(gradients, trained).float() * scale
        if self.accepts is None or self.accepts(batch, total / count, norm):
            self._mean_and_clip(gradients, scale, norm)
        else:
            optimizer.zero_grad()  # a step without gradients changes nothing, and is counted
        optimizer.step()
        optimizer.zero_grad()
        assert self._ring is not None
        # a number is made a tensor on the device: copied to a GPU, it would be waited for
        read = torch.zeros((), device=self.device) + tokens_read(batch)
        measured = (total, batch["n_bytes"].sum().float(), read, count.float(), norm)
        self._ring[step % self.log_every] = torch.stack(measured)

    def _factor(self, step: int) -> float:
        """The schedule's, or its end moved to where the time ends, its spans in steps shortened alike."""
        if self.planned_steps is None:
            return self.schedule(step, self.max_steps)
        return self.schedule(min(self.max_steps - 1, step * self.max_steps // self.planned_steps), self.max_steps)

    def _no_sync(self) -> Any:
        """Gradients of all but the last micro-batch stay on their device."""
        if isinstance(self.model, FSDPModule):
            return self._gradients_kept(self.model)
        model = self.trainer.model
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()  # type: ignore[union-attr, operator]

    @contextmanager
    def _gradients_kept(self, model: FSDPModule) -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @torch.no_grad()
    def _mean_and_clip(self, gradients: list[Tensor], scale: Tensor, norm: Tensor) -> None:
        """Turn summed gradients into the mean over the batch's tokens, and cut it to `clip_norm`."""
        if self.clip_norm is not None:
            scale = scale * torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
        scale_(gradients, scale)

    def read_window(self, step: int) -> StepRecord:
        """Read what was measured since the last call up to before `step`: the one host read of the window.

        Collective: every device must call it at the same step. The window is at most `log_every` steps long.
        """
        assert self._ring is not None
        steps = list(range(self._window_start, step))
        assert len(steps) <= self.log_every, "the ring was overwritten before it was read"
        self._window_start = step
        values = self._ring.clone()
        if data_share(self.trainer)[1] > 1:
            sums = values[:, :3].contiguous()
            dist.all_reduce(sums, group=data_group(self.trainer))  # counts and norms are equal on all devices already
            values[:, :3] = sums
        rows = values.cpu().double()[[s % self.log_every for s in steps]]
        nats, n_bytes, read, count, norm = rows.T
        return StepRecord(
            steps,
            loss=(nats / count).tolist(),
            tokens=[int(n) for n in count.tolist()],
            positions=[int(n) for n in read.tolist()],
            n_bytes=n_bytes.tolist(),
            grad_norm=norm.tolist(),
        )


def freeze_parts(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters under these names out of training. Raises `UserError` for a name that nothing has, and if
    nothing is left to train."""
    names = {prefix for name, _ in model.named_parameters() for prefix in _prefixes(name)}
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            tops = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise UserError(
                f"task.freeze={pattern}: {type(model).__name__} has no such part; expected a name or a pattern of "
                f"names that begin with {tops}, such as blocks.0."
            )
        for name, p in model.named_parameters(remove_duplicate=False):
            if any(prefix in found for prefix in _prefixes(name)):
                p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"task.freeze={list(patterns)} leaves nothing to train; freeze less.")


def _prefixes(name: str) -> list[str]:
    """blocks.0.norm.weight: blocks, blocks.0, ..."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def split_batch(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Cut a batch into micro-batches of at most `size` rows; None: one."""
    n = batch["labels"].shape[0]
    if size is None or size >= n:
        yield batch
        return
    for start in range(0, n, size):
        rows = slice(start, start + size)
        yield each_tensor(batch, lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]


def tokens_read(batch: Batch) -> int | Tensor:
    """Tokens that the model reads, of encoder and decoder, padding left out."""
    inputs = batch["inputs"]
    read: int | Tensor = 0
    for name in ("", "decoder_"):
        if f"{name}documents" in inputs:
            read = read + (inputs[f"{name}documents"] >= 0).sum()
        elif f"{name}tokens" in inputs:
            read = read + inputs[f"{name}tokens"].numel()
    return read
