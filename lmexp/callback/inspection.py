"""What a trained model looks like from inside: attention maps, and the token embeddings for the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import nn

from lmexp.callback.base import RunCallback
from lmexp.contracts import UserError
from lmexp.data.loader import each_tensor
from lmexp.model.layers import recorded_attention
from lmexp.optimizer.sharding import gathered

_CELL = 12  # pixels a side
_LABEL = 110  # pixels for the tokens beside and above a map


class Inspection(RunCallback):
    """At the last validation: attention of chosen layers on the first validation text as images (attention/ in
    TensorBoard), and the embeddings of the first tokens with their spellings for the projector."""

    def __init__(self, layers: Sequence[int], tokens: int, embeddings: int) -> None:
        if tokens < 1 or embeddings < 0:
            raise UserError(
                f"callback.inspection.tokens={tokens} and embeddings={embeddings}; expected at least 1 and at least 0."
            )
        self.layers = list(layers)
        self.tokens = tokens
        self.embeddings = embeddings
        self.idle = not self.layers and not embeddings
        """Nothing to do: the job leaves it out."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = trainer.global_step == self.session.max_steps or trainer.should_stop
        if trainer.state.fn != "fit" or not last:
            return
        model = cast(nn.Module, pl_module.model)
        with gathered(model):
            if isinstance(trainer.logger, TensorBoardLogger):
                self._show(trainer, model)

    def _show(self, trainer: Trainer, model: nn.Module) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(trainer.logger, TensorBoardLogger)
        writer = trainer.logger.experiment
        spell = [data.tokenizer.decode([i]).replace("\n", "\\n") for i in range(data.tokenizer.vocab_size)]
        with self.session.pause():
            for name, weights, rows, columns in self._maps(trainer, model, data):
                image = attention_image(weights, [spell[i] for i in rows], [spell[i] for i in columns])
                writer.add_image(f"attention/{name}", image, trainer.global_step, dataformats="HWC")
            embed = getattr(model, "embed", None)
            if self.embeddings and isinstance(embed, nn.Embedding):
                n = min(self.embeddings, len(spell))
                labels = [f"{i} {text!r}" for i, text in enumerate(spell[:n])]  # quoted: white space would be lost
                table = embed.weight[:n].detach().float().cpu().clone()  # numpy would hold on to the memory
                writer.add_embedding(table, metadata=labels, global_step=trainer.global_step, tag="tokens")

    @torch.no_grad()
    def _maps(
        self, trainer: Trainer, model: nn.Module, data: Any
    ) -> list[tuple[str, np.ndarray, list[int], list[int]]]:
        """(name, weights (H, T, S), ids of the rows, ids of the columns) of each chosen layer."""
        if not self.layers:
            return []
        batch = next(iter(data.loader("validation", 1)))
        inputs = each_tensor(batch, lambda t: t[:1].to(trainer.strategy.root_device))["inputs"]
        if "decoder_tokens" in inputs and inputs["decoder_tokens"].shape == inputs["tokens"].shape:
            # without the last column, which the others don't see, a map's shape says which side its rows are of
            inputs = {name: x[:, :-1] if name.startswith("decoder_") else x for name, x in inputs.items()}
        eager = torch.compiler.set_stance("force_eager")
        with recorded_attention() as record, trainer.precision_plugin.forward_context(), eager:
            model(**inputs)
        tokens = inputs["tokens"][0].tolist()
        written = inputs["decoder_tokens"][0].tolist() if "decoder_tokens" in inputs else tokens
        maps = []
        for layer in self.layers:
            if not -len(record) <= layer < len(record):
                continue
            weights = record[layer][0]  # (H, T, S)
            rows = tokens if weights.shape[1] == len(tokens) else written
            columns = tokens if weights.shape[2] == len(tokens) else written
            n = self.tokens
            name = str(layer % len(record))
            if written is not tokens:
                across = weights.shape[1] != weights.shape[2]
                name += "-target-over-source" if across else "-target" if rows is written else "-source"
            maps.append((name, weights[:, :n, :n].cpu().numpy(), rows[:n], columns[:n]))
        return maps


def attention_image(weights: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """The heads (H, T, S) beside one another, dark where a row looks at a column; (height, width, 3) uint8."""
    n_heads, height, width = weights.shape
    size = (_LABEL + n_heads * (width * _CELL + _CELL), _LABEL + height * _CELL + _CELL)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for y, label in enumerate(rows):
        draw.text((2, _LABEL + y * _CELL), _shown(label), fill="black")
    upright = Image.new("RGB", (_LABEL, width * _CELL), "white")
    pen = ImageDraw.Draw(upright)
    for x, label in enumerate(columns):
        pen.text((2, x * _CELL), _shown(label), fill="black")
    upright = upright.rotate(90, expand=True)
    for head in range(n_heads):
        left = _LABEL + head * (width * _CELL + _CELL)
        shade = (255 * (1 - weights[head] / max(1e-9, float(weights[head].max())))).astype(np.uint8)
        cells = Image.fromarray(shade).resize((width * _CELL, height * _CELL), Image.Resampling.NEAREST)
        page.paste(upright, (left, 0))
        page.paste(cells.convert("RGB"), (left, _LABEL))
        draw.text((left, _LABEL + height * _CELL), f"head {head}", fill="black")
    return np.asarray(page)


def _shown(label: str) -> str:
    """What the built-in font can draw, and no longer than its place."""
    return label.encode("latin-1", "replace").decode("latin-1")[:17]
