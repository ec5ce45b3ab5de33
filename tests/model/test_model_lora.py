"""Adapters: how many numbers they have, that they begin as nothing, and that they merge."""

from __future__ import annotations

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.model.bert import BertConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.lora import LoRA, add_lora, merged
from lmexp.model.transformer import TransformerConfig

CONFIGS = {
    "gpt": GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=32),
    "bert": BertConfig(n_layers=2, n_heads=2, d_model=16, max_length=32, dropout=0.0, attention_dropout=0.0),
    "transformer": TransformerConfig(n_layers=2, n_heads=2, d_model=16, max_length=32, dropout=0.0),
}
TOKENS = torch.arange(12).reshape(2, 6)


def logits(model) -> torch.Tensor:
    inputs = {"tokens": TOKENS}
    if model.family == "encoder_decoder":
        inputs["decoder_tokens"] = TOKENS
    return model.head(model(**inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_begin_as_nothing_train_alone_and_merge(name: str) -> None:
    torch.manual_seed(0)
    model = CONFIGS[name].build(40).eval()
    before = logits(model)
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    lora = LoRA(rank=3, alpha=12)
    shapes = [
        m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(map(str.isdigit, n))
    ]
    add_lora(model, lora, seed=1)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(3 * (rows + columns) for rows, columns in shapes)

    logits(model).square().mean().backward()
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p), alpha=0.1)
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    whole = merged(model.state_dict(), lora.scale)
    assert whole.keys() == plain.keys()
    again = CONFIGS[name].build(40).eval()
    again.load_state_dict(whole)
    torch.testing.assert_close(logits(again), adapted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(whole[n], plain[n]) for n in plain if "embed" in n or "norm" in n)


def test_the_seed_decides_them_and_nothing_else_is_drawn() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = CONFIGS["gpt"].build(40)
        following = torch.random.get_rng_state()
        add_lora(model, LoRA(), seed)
        assert torch.equal(torch.random.get_rng_state(), following)
        states.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_targets_by_name_and_pattern() -> None:
    model = CONFIGS["gpt"].build(40)
    add_lora(model, LoRA(rank=2, targets=["qkv", "blocks.1.*"]), 0)
    adapted = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert "blocks.0.attention.qkv" in adapted
    assert all(name.startswith("blocks.1.") or name.endswith("qkv") for name in adapted)
    assert len(adapted) > 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "task.lora.rank=0; expected a whole number of at least 1"),
        ({"alpha": 0}, "task.lora.alpha=0"),
        ({"dropout": 1}, "task.lora.dropout=1"),
        ({"r": 8}, "task.lora.r: there is no such key; expected some of rank, alpha, dropout, targets"),
    ],
)
def test_settings_that_are_none(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        LoRA.of(settings)


def test_targets_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"targets=q_proj: GPT has no such linear layer.*one of .*qkv"):
        add_lora(CONFIGS["gpt"].build(40), LoRA(targets=["q_proj"]), 0)
