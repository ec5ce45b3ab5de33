"""Rows that go on from one another with a cache against whole passes over their texts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lmexp.decoding.steps import steps_of
from lmexp.model import kv_cache
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.llama import LlamaConfig
from lmexp.model.t5 import T5Config
from lmexp.model.transformer import TransformerConfig

VOCAB, LENGTH = 29, 40
CONFIGS: dict[str, Any] = {
    "gpt": GPTConfig(n_layers=2, n_heads=3, d_model=24, max_length=LENGTH),
    "llama": LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, d_ff=40, d_head=8, max_length=LENGTH),
    "fast": FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=LENGTH),
    "t5": T5Config(n_layers=2, n_heads=2, d_model=16, d_ff=24, n_buckets=8, max_distance=12, max_length=LENGTH),
    "transformer": TransformerConfig(n_layers=2, n_heads=2, d_model=16, max_length=LENGTH),
}
PROMPTS = {"even": [[5, 6, 7], [8, 9, 10], [11, 12, 13]], "ragged": [[5, 6, 7, 3, 4], [8], [11, 12, 13]]}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = CONFIGS[name].build(VOCAB).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def whole(model: Any, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Logits after a text, in one pass and alone."""
    if model.family == "encoder_decoder":
        start = [model.decoder_start_id, *text]
        return model.head(model(torch.tensor([prompt]), torch.tensor([start])))[0, -1]
    return model.head(model(torch.tensor([[*prompt, *text]])))[0, -1]


def uneven(rng: random.Random, n: int, step: int) -> list[int]:
    return [row for row in range(n) if rng.random() < 0.9 or n < 4]


def leaving(rng: random.Random, n: int, step: int) -> list[int]:
    gone = rng.randrange(n // 3) if step % 4 == 0 and n > 3 else None
    return [row for row in range(n) if row // 3 != gone]


SELECTIONS = {
    "beams": lambda rng, n, step: [3 * text + rng.randrange(3) for text in range(n // 3) for _ in range(3)],
    "texts leave": leaving,
    "rows leave": uneven,
    "anything": lambda rng, n, step: [rng.randrange(n) for _ in range(rng.randrange(1, 7))],
    "nothing moves": lambda rng, n, step: list(range(n)),
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_selected_rows_are_their_texts(dtype, tolerance, name, prompts, selection, monkeypatch):
    monkeypatch.setattr(kv_cache, "_MORE", 2)  # room is soon made
    model, rng, given = build(name).to(dtype), random.Random(1), PROMPTS[prompts]
    texts = [(prompt, []) for prompt in given]
    with torch.no_grad():
        steps = steps_of(model, given, 24)
        for step in range(24):
            expected = torch.stack([whole(model, prompt, text) for prompt, text in texts])
            torch.testing.assert_close(steps.logits(), expected, rtol=tolerance, atol=tolerance)
            if selection == "nothing moves":
                rows = list(range(len(texts)))
            elif step == 0:
                rows = [row for row in range(3) for _ in range(3)]
            else:
                rows = SELECTIONS[selection](rng, len(texts), step)
            tokens = [rng.randrange(VOCAB) for _ in rows]
            texts = [(texts[row][0], [*texts[row][1], token]) for row, token in zip(rows, tokens, strict=True)]
            steps.select(rows)
            steps.append(torch.tensor(tokens))


def test_what_rows_have_in_common_is_kept_once(monkeypatch):
    monkeypatch.setattr(kv_cache, "_MORE", 2)
    model = build("gpt")
    with torch.no_grad():
        steps: Any = steps_of(model, PROMPTS["even"], 24)
        for step in range(24):
            steps.logits()
            n = 3 if step == 0 else 9
            steps.select([row - row % 3 if step else row for row in range(n) for _ in range(1 if step else 3)])
            steps.append(torch.zeros(9, dtype=torch.int64))
    # the first row of each text is the past of all: 3 columns of the prompt, one of each step, the last ones' of all
    columns = steps.cache.columns()
    assert (columns[0, 0] == 0).any(0).sum() == 3 + 23 + 3
    assert columns.shape[-1] < 3 + 3 * 23
    assert steps.cache._held.shape[4] <= 3 + 24 + 3 * 3


def test_more_rows_than_columns():
    model = build("gpt")
    with torch.no_grad():
        steps = steps_of(model, [[5], [6]], 3)
        texts = [([5], []), ([6], [])]
        for _ in range(3):
            expected = torch.stack([whole(model, prompt, text) for prompt, text in texts])
            torch.testing.assert_close(steps.logits(), expected, rtol=1e-9, atol=1e-9)
            rows = [row for row in range(len(texts)) for _ in range(4)]
            texts = [(texts[row][0], [*texts[row][1], n % VOCAB]) for n, row in enumerate(rows)]
            steps.select(rows)
            steps.append(torch.arange(len(rows)) % VOCAB)
