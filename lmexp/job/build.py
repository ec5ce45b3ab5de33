"""From configuration nodes to objects; `_target_` is the only registry."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from torch.distributed import is_torchelastic_launched

from lmexp.callback.checkpoint import CheckpointFiles
from lmexp.contracts import Objective, UserError
from lmexp.data.labelled import is_labelled
from lmexp.data.text import TextData
from lmexp.metric.classification import ClassificationScores
from lmexp.task.base import BaseTask
from lmexp.task.sharded import Sharded


def build_node(cfg: DictConfig, key: str) -> Any:
    """The object that a node's `_target_` makes of its other keys; `UserError` names the node for what does not fit."""
    node = OmegaConf.select(cfg, key)
    if node is None or "_target_" not in node:
        raise UserError(f"{key} has no _target_; choose one of the options that python run.py --help lists for it.")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = str(cause if cause is not None else error).splitlines()[0]
        values = ", ".join(f"{k}={v}" for k, v in node.items() if k != "_target_" and not isinstance(v, DictConfig))
        raise UserError(f"{key} cannot be made of {values}: {reason}. Set the value that does not fit.") from error


@dataclass(frozen=True)
class Parts:
    """The checked parts of an experiment, before any data is read."""

    data: TextData
    tokenizer: Any
    model: Any
    """The model's configuration; its `build` makes the model."""

    objective: Objective
    optimizer: Any
    schedule: Any
    sampling: Any
    metric: Any
    callbacks: list[Callback]


def classes_of(data: TextData) -> dict[str, Any] | None:
    """What `ClassificationScores.bind` takes, for checkpoints to keep; None for a corpus without labels."""
    if not is_labelled(data.corpus):
        return None
    corpus: Any = data.corpus
    return {"classes": list(corpus.labels), "multilabel": bool(corpus.multilabel), "groups": list(corpus.groups)}


def bind_metric(metric: Any, objective: Objective, data: TextData, token_bytes: torch.Tensor | None = None) -> None:
    """Tell a metric what the corpus and the objective decide: the classes, or the parts and the bytes of tokens."""
    classes = classes_of(data)
    if classes is not None and isinstance(metric, ClassificationScores):
        metric.bind(**classes)
    else:
        metric.bind(objective.bits, data.part_names, token_bytes)


def build_task(cfg: DictConfig, parts: Parts, vocab_size: int, device: str = "cpu") -> BaseTask:
    """The LightningModule with a model at the random weights of `seed`; on the device `meta`, only its shapes.

    Raises `UserError` for values that its model or its task cannot be made of.
    """
    torch.manual_seed(cfg.seed)
    try:
        with torch.device(device):
            model = parts.model.build(vocab_size)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        values = ", ".join(f"{k}={v}" for k, v in cfg.model.items() if k != "_target_")
        raise UserError(f"model cannot be made of {values}: {str(error).splitlines()[0]}") from error
    if parts.data.block_size > model.max_length:
        raise UserError(
            f"data.block_size={parts.data.block_size} is more than model.max_length={model.max_length}; lower the one "
            "or raise the other."
        )
    own = {key: value for key, value in cfg.task.items() if key != "_target_"}
    try:
        task = get_class(cfg.task._target_)(
            model=model,
            optimizer=parts.optimizer.build,
            schedule=parts.schedule,
            metric=parts.metric,
            max_steps=cfg.max_steps,
            micro_batch_size=cfg.trainer.micro_batch_size,
            log_every=cfg.log_every,
            flops_per_token=model.flops_per_token(parts.data.block_size),
            compile=cfg.trainer.compile,
            recompute=cfg.trainer.recompute_activations,
            **own,
        )
    except TypeError as error:
        values = ", ".join(f"{k}={v}" for k, v in own.items())
        raise UserError(f"task cannot be made of {values}: {error}.") from error
    assert isinstance(task, BaseTask)
    return task


def accelerator_of(cfg: DictConfig) -> str:
    """cpu, cuda or mps: what `trainer.accelerator` means on this machine. Raises `UserError` for what is not there."""
    wanted = cfg.trainer.accelerator
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if wanted not in ("cpu", "cuda", "mps"):
        raise UserError(f"trainer.accelerator={wanted}; expected auto, cpu, cuda or mps.")
    if (wanted == "cuda" and not has_cuda) or (wanted == "mps" and not has_mps):
        raise UserError(f"trainer.accelerator={wanted}: there is no such device here; use trainer=cpu or trainer=auto.")
    return wanted


def precision_of(cfg: DictConfig) -> str:
    """The precision that `trainer.precision` means here."""
    wanted = cfg.trainer.precision
    if wanted == "auto":
        return "bf16-mixed" if accelerator_of(cfg) == "cuda" else "32-true"
    if wanted not in ("32-true", "bf16-mixed", "bf16-true"):
        raise UserError(f"trainer.precision={wanted}; expected auto, 32-true, bf16-mixed or bf16-true.")
    return wanted


def build_trainer(
    cfg: DictConfig,
    world_size: int,
    callbacks: list[Callback],
    checkpoint_files: CheckpointFiles,
    logger: Any = False,
) -> Trainer:
    """Lightning's trainer: one epoch without end, cut into steps; all that it would do by itself is off."""
    accelerator = accelerator_of(cfg)
    strategy: Any = "auto"
    if cfg.trainer.strategy == "ddp":
        strategy = DDPStrategy(
            process_group_backend="gloo" if accelerator == "cpu" else None, gradient_as_bucket_view=True
        )
    elif cfg.trainer.strategy == "fsdp":
        across = cfg.trainer.tensor_parallel
        in_pieces = bool(OmegaConf.select(cfg, "callback.checkpoint.sharded", default=False))
        strategy = Sharded(world_size // across, across, in_pieces, "gloo" if accelerator == "cpu" else None)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1
    # lmexp or torchrun started the processes; Lightning would take those of a SLURM step for its own
    own: list[Any] = [] if is_torchelastic_launched() else [LightningEnvironment()]
    trainer = Trainer(
        accelerator=accelerator,
        devices=here,
        num_nodes=world_size // here,
        strategy=strategy,
        precision=precision_of(cfg),  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=cfg.max_steps,
        val_check_interval=cfg.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=callbacks,
        plugins=[checkpoint_files, *own],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=cfg.trainer.strategy != "fsdp",  # which weights in pieces cannot be brought together in
        benchmark=False,
    )
    # Lightning would ask rank 0 before every step whether it got a signal, and wait for the device to answer; the
    # Checkpoint callback settles that between the processes' CPUs
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer
