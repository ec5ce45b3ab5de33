"""The training step against plain autograd: the mean over all scored tokens, clipped, whatever the micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lmexp.contracts import IGNORE_INDEX, Batch, UserError
from lmexp.metric.language_modeling import LanguageModeling
from lmexp.model.gpt import GPTConfig
from lmexp.schedule.schedules import Linear
from lmexp.task.base import split_batch
from lmexp.task.pretrain import Pretrain

CONFIG = GPTConfig(n_layers=1, n_heads=2, d_model=8, max_length=8)
VOCAB = 11


def batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, 9), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(rows):  # unequal counts, so that a mean of means would be another number
        labels[row, : row + 1] = IGNORE_INDEX
    return {"inputs": {"tokens": tokens[:, :-1]}, "labels": labels, "n_bytes": torch.arange(rows).float()}


def task(micro: int | None, clip: float | None) -> Pretrain:
    torch.manual_seed(0)
    made = Pretrain(
        metric=LanguageModeling(),
        model=CONFIG.build(VOCAB),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        schedule=Linear(),
        max_steps=10,
        clip_norm=clip,
        micro_batch_size=micro,
        log_every=4,
        flops_per_token=1.0,
    )
    optimizer = made.configure_optimizers()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    made._trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, global_rank=0, global_step=0, model=made, strategy=None
    )
    made.optimizers = lambda: optimizer  # type: ignore[assignment, method-assign]
    made.manual_backward = lambda loss: loss.backward()  # type: ignore[assignment, method-assign]
    made.on_train_start()
    return made


def reference(clip: float | None) -> tuple[list[torch.Tensor], float, float]:
    """Weights after a step, the loss and the gradient norm, by plain torch."""
    torch.manual_seed(0)
    model = CONFIG.build(VOCAB)
    data = batch()
    logits = model.head(model(**data["inputs"]))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else float("inf"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.step()
    return [p.detach() for p in model.parameters()], loss.item(), norm.item()


@pytest.mark.parametrize("clip", [None, 0.01, 100.0])
@pytest.mark.parametrize("micro", [None, 1, 2, 4, 6, 50])
def test_one_step_is_that_of_the_mean_loss(micro: int | None, clip: float | None) -> None:
    made = task(micro, clip)
    made.training_step(batch(), 0)
    weights, loss, norm = reference(clip)
    for ours, theirs in zip(made.model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    record = made.read_window(1)
    assert record.steps == [0]
    assert record.loss == [pytest.approx(loss, rel=1e-5)]
    assert record.grad_norm == [pytest.approx(norm, rel=1e-4)]
    assert record.tokens == [int((batch()["labels"] != IGNORE_INDEX).sum())]
    assert record.n_bytes == [15.0]


def test_the_schedule_sets_the_rate_of_each_step() -> None:
    made = task(None, None)
    rates = []
    for step in range(10):
        made._trainer.global_step = step  # type: ignore[union-attr]
        made.training_step(batch(step), step)
        rates.append(made.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        if step % 3 == 2:
            made.read_window(step + 1)
    assert rates == pytest.approx([0.5 * (1 - s / 10) for s in range(10)])


def test_windows_follow_one_another() -> None:
    made = task(None, None)
    seen: list[Any] = []
    for step in range(9):
        made._trainer.global_step = step  # type: ignore[union-attr]
        made.training_step(batch(step), step)
        if step in (0, 3, 4, 8):
            seen.append(made.read_window(step + 1).steps)
    assert seen == [[0], [1, 2, 3], [4], [5, 6, 7, 8]]
    assert made.read_window(9).steps == []


def test_micro_batches_are_the_batch() -> None:
    parts = list(split_batch(batch(), 4))
    assert [part["labels"].shape[0] for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch()["labels"])
    assert torch.equal(torch.cat([part["inputs"]["tokens"] for part in parts]), batch()["inputs"]["tokens"])


def test_a_clip_norm_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.clip_norm=0"):
        task(None, 0.0)
