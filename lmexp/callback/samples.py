"""Generated text at each validation: what the numbers mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lmexp.callback.base import RunCallback
from lmexp.contracts import UserError
from lmexp.decoding.generate import Sampling, generate


class Samples(RunCallback):
    """Continues prompts and shows them under samples/ in TensorBoard, the first in the terminal at the end."""

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
        if trainer.state.fn != "fit" or not trainer.is_global_zero or not self.prompts:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        sampling = dataclasses.replace(self.sampling, max_new_tokens=self.max_new_tokens)
        prompts = [[tokenizer.eos_id, *(int(i) for i in ids)] for ids in tokenizer.encode(self.prompts)]
        # eager: each new token is another shape, which a compiled model would be compiled for
        with self.session.pause(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            rows = generate(cast(nn.Module, pl_module.model), prompts, sampling, tokenizer.eos_id, tokenizer.vocab_size)
        self.latest = [
            prompt + tokenizer.decode(row, skip_special=True) for prompt, row in zip(self.prompts, rows, strict=True)
        ]
        if isinstance(trainer.logger, TensorBoardLogger):
            for number, text in enumerate(self.latest):
                indented = "\n".join(f"    {line}" for line in text.splitlines())
                trainer.logger.experiment.add_text(f"samples/{number}", indented, trainer.global_step)
