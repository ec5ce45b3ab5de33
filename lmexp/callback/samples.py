"""Text at each validation, for what the numbers mean: continued prompts, or noised text beside its restoration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lmexp.callback.base import RunCallback
from lmexp.contracts import IGNORE_INDEX, UserError
from lmexp.data.loader import each_tensor
from lmexp.decoding.generate import Sampling, generate
from lmexp.optimizer.sharding import gathered


class Samples(RunCallback):
    """Shows what the model writes under samples/ in TensorBoard, the first in the terminal at the end.

    A decoder continues prompts. Encoders and encoder-decoders restore the first texts of the validation split: what
    they read, what they took the scored tokens for, given the true ones before, and what these were.
    """

    sampling: Sampling

    def __init__(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"callback.samples.max_new_tokens={max_new_tokens}; expected at least 1.")
        if isinstance(prompts, str):
            raise UserError(
                f"callback.samples.prompts={prompts}; expected a list: 'callback.samples.prompts=[{prompts}]'."
            )
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.latest: list[str] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or not self.prompts:
            return
        model = cast(nn.Module, pl_module.model)
        with gathered(model):
            if trainer.is_global_zero:
                self._write(trainer, model)

    def _write(self, trainer: Trainer, model: nn.Module) -> None:
        # eager: each new token is another shape, which a compiled model would be compiled for
        with self.session.pause(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            if model.family == "decoder":
                self.latest = self._continued(trainer, model)
            else:
                self.latest = self._restored(trainer, model)
        if isinstance(trainer.logger, TensorBoardLogger):
            for number, text in enumerate(self.latest):
                indented = "\n".join(f"    {line}" for line in text.splitlines())
                trainer.logger.experiment.add_text(f"samples/{number}", indented, trainer.global_step)

    def _continued(self, trainer: Trainer, model: nn.Module) -> list[str]:
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        least = min(self.sampling.min_new_tokens, self.max_new_tokens)
        sampling = dataclasses.replace(self.sampling, max_new_tokens=self.max_new_tokens, min_new_tokens=least)
        prompts = [[tokenizer.eos_id, *(int(i) for i in ids)] for ids in tokenizer.encode(self.prompts)]
        rows = generate(model, prompts, sampling, tokenizer.eos_id, tokenizer.vocab_size)
        return [
            prompt + tokenizer.decode(row, skip_special=True) for prompt, row in zip(self.prompts, rows, strict=True)
        ]

    @torch.no_grad()
    def _restored(self, trainer: Trainer, model: nn.Module) -> list[str]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = next(iter(data.loader("validation", max(1, len(self.prompts)))))
        batch = each_tensor(batch, lambda tensor: tensor[: len(self.prompts)].to(trainer.strategy.root_device))
        hidden = model(**batch["inputs"])
        labels = batch["labels"]
        read = batch["inputs"]["tokens"]
        if "scored" in batch:
            hidden = hidden.gather(1, batch["scored"][..., None].expand(-1, -1, hidden.shape[-1]))
        guessed = model.head(hidden)[..., : data.tokenizer.vocab_size].argmax(-1)  # type: ignore[operator]
        texts = []
        for row in range(len(labels)):
            real = labels[row] != IGNORE_INDEX
            at = batch["scored"][row][real] if "scored" in batch else None
            shown = {"read": read[row], "written": guessed[row][real], "true": labels[row][real]}
            if at is not None:  # the scored places in their text
                shown = {"read": read[row], "written": read[row].clone(), "true": read[row].clone()}
                shown["written"][at], shown["true"][at] = guessed[row][real], labels[row][real]
            lines = (f"{name}: {data.tokenizer.decode(ids[: self.max_new_tokens])}" for name, ids in shown.items())
            texts.append("\n\n".join(lines))
        return texts
