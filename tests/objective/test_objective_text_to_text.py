"""Pairs that share rows are told as well as each alone, and what is cut is what the lengths say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmexp.contracts import IGNORE_INDEX, Sample, UserError
from lmexp.model.gpt import GPTConfig
from lmexp.model.t5 import T5Config
from lmexp.model.transformer import TransformerConfig
from lmexp.objective.text_to_text import TextToText
from lmexp.tokenizer.byte import Byte

BLOCK = 32
PAIRS = [("one", "eins"), ("twenty-two", "zweiundzwanzig"), ("a", "b"), ("three four", "drei vier"), ("xyz", "u")]
SHAPE: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": 16, "dropout": 0.0, "max_length": BLOCK}
MODELS = {
    "transformer": TransformerConfig(**SHAPE),
    "learned": TransformerConfig(**SHAPE, positions="learned"),
    "t5": T5Config(**SHAPE, d_ff=32),
    "gpt": GPTConfig(**SHAPE),
}


def tokenizer() -> Any:
    return Byte().train(iter(())).with_roles(TextToText().special_tokens("decoder"))


def sample(tokens: Any, index: int, source: str, target: str) -> Sample:
    ids = [np.array(row, dtype=np.int64) for row in tokens.encode([source, target])]
    sides = [tokens.token_bytes[row].astype(np.float32) for row in ids]
    return Sample(ids[0], sides[0], index, pair=Sample(ids[1], sides[1], index))


@pytest.mark.parametrize("name", MODELS)
def test_packed_pairs_have_the_losses_they_have_alone(name: str) -> None:
    torch.manual_seed(0)
    tokens = tokenizer()
    model: Any = MODELS[name].build(tokens.vocab_size).eval().double()
    batch = TextToText().collate(tokens, model.family)([sample(tokens, i, *p) for i, p in enumerate(PAIRS)], BLOCK, 0)
    assert len(batch["labels"]) < len(PAIRS), "pairs share rows"
    assert batch["n_bytes"].sum() == sum(len(target) for _, target in PAIRS)

    def nats(inputs: dict[str, Any], labels: torch.Tensor, scored: torch.Tensor | None = None) -> torch.Tensor:
        hidden = model(**inputs)
        if scored is not None:
            hidden = hidden.gather(1, scored[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.head(hidden).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)

    alone = torch.zeros((), dtype=torch.float64)
    for source, target in PAIRS:
        read, write = (torch.tensor([[int(i) for i in row]]) for row in tokens.encode([source, target]))
        eos, sep = torch.tensor([[tokens.eos_id]]), torch.tensor([[tokens.roles["sep"]]])
        labels = torch.cat((write, eos), 1)
        if model.family == "decoder":
            text = torch.cat((eos, read, sep, write), 1)
            labels = torch.cat((torch.full((1, read.shape[1] + 1), IGNORE_INDEX), labels), 1)
            alone += nats({"tokens": text}, labels)
        else:
            start = torch.tensor([[tokens.pad_id]])
            inputs = {"tokens": torch.cat((read, eos), 1), "decoder_tokens": torch.cat((start, write), 1)}
            alone += nats(inputs, labels)
    together = nats(batch["inputs"], batch["labels"], batch.get("scored"))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_long_texts_are_cut() -> None:
    tokens = tokenizer()
    long = sample(tokens, 0, "s" * 100, "t" * 100)
    settings = TextToText(max_source=10, max_target=7)
    batch = settings.collate(tokens, "encoder_decoder")([long], BLOCK, 0)
    assert (batch["inputs"]["documents"] == 0).sum() == 10
    assert (batch["labels"] != IGNORE_INDEX).sum() == 7
    assert batch["labels"][0, 6] == tokens.eos_id
    assert batch["n_bytes"].tolist() == [6]
    batch = settings.collate(tokens, "decoder")([long], BLOCK, 0)
    assert (batch["inputs"]["documents"] == 0).sum() == 10 + 6
    assert settings.lengths(BLOCK, "decoder") == (10, 7)
    assert TextToText().lengths(BLOCK, "decoder") == (16, 16)
    assert TextToText().lengths(BLOCK, "encoder_decoder") == (BLOCK, BLOCK)


def test_of_a_decoder_the_source_may_be_scored_too() -> None:
    """Every token but the first is told, each at the place before it, and the bytes are those of both."""
    tokens = tokenizer()
    samples = [sample(tokens, i, *p) for i, p in enumerate(PAIRS)]
    batch = TextToText(score_source=True).collate(tokens, "decoder")(samples, BLOCK, 0)
    assert batch["n_bytes"].sum() == sum(len(text) for pair in PAIRS for text in pair)
    inputs = batch["inputs"]
    told = []
    for row, labels in enumerate(batch["labels"]):
        for number in range(int(inputs["documents"][row].max()) + 1):
            places = (inputs["documents"][row] == number).nonzero().flatten()
            scored = batch["scored"][row][labels != IGNORE_INDEX]
            here = [
                (int(p), int(t)) for p, t in zip(scored, labels[labels != IGNORE_INDEX], strict=True) if p in places
            ]
            assert [p for p, _ in here] == places.tolist()
            assert [t for _, t in here[:-1]] == inputs["tokens"][row, places[1:]].tolist()
            told.append([t for _, t in here])
    expected = []
    for source, target in PAIRS:
        read, write = ([int(i) for i in row] for row in tokens.encode([source, target]))
        expected.append([*read, tokens.roles["sep"], *write, tokens.eos_id])
    assert sorted(told) == sorted(expected)


def test_rows_have_room_for_one_longest_target() -> None:
    """Else a row of several short sources would make the decoder's side of all rows as long as its targets together."""
    tokens = tokenizer()
    samples = [sample(tokens, i, "s", "t" * n) for i, n in enumerate((4, 3, 2, 1, 5, 1))]
    batch = TextToText(max_target=7).collate(tokens, "encoder_decoder")(samples, BLOCK, 0)
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == [7, 7, 6, 2], "of 5, 4, 3, 2, 6 and 2 with their ends"
    assert (TextToText().collate(tokens, "encoder_decoder")(samples, BLOCK, 0)["labels"] != IGNORE_INDEX).sum() == 22


def test_the_decoder_begins_with_the_models_token() -> None:
    tokens = tokenizer()
    samples = [sample(tokens, i, *p) for i, p in enumerate(PAIRS)]
    inputs = TextToText().collate(tokens, "encoder_decoder", 7)(samples, BLOCK, 0)["inputs"]
    starts = (inputs["decoder_documents"] >= 0) & (inputs["decoder_positions"] == 0)
    assert starts.sum() == len(PAIRS)
    assert (inputs["decoder_tokens"][starts] == 7).all()


def test_lengths_without_room_are_told() -> None:
    with pytest.raises(UserError, match="max_source=1; expected at least 2"):
        TextToText(max_source=1)
    with pytest.raises(UserError, match=r"block_size=32 has no room for .*max_source=40.*set data.block_size=40"):
        TextToText(max_source=40).lengths(BLOCK, "encoder_decoder")
    with pytest.raises(UserError, match=r"beside one another; set data.block_size=40"):
        TextToText(max_source=20, max_target=20).lengths(BLOCK, "decoder")
