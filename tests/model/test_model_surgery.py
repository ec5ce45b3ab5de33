"""Rows for new words: means of their pieces' rows, everything else bit by bit."""

from __future__ import annotations

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.model.bert import BertConfig
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.layers import Head
from lmexp.model.llama import LlamaConfig
from lmexp.model.surgery import grow_vocabulary, vocabulary_parameters
from lmexp.model.t5 import T5Config
from lmexp.model.transformer import TransformerConfig

OLD, PIECES = 29, [[3, 5, 5], [28], [], [0, 1, 2, 3]]
NEW = OLD + len(PIECES)
SIZE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "max_length": OLD}  # as many positions as tokens: no matter
DECODERS = {
    "gpt": GPTConfig(**SIZE),
    "gpt_padded": GPTConfig(**SIZE, vocab_multiple=16),
    "gpt_in_padding": GPTConfig(**SIZE, vocab_multiple=64),
    "llama": LlamaConfig(**SIZE, d_ff=24),
    "llama_tied": LlamaConfig(**SIZE, d_ff=24, tied=True, vocab_multiple=8),
    "fast": FastConfig(**SIZE, value_layers=1, vocab_multiple=16),
    "fast_tied": FastConfig(**SIZE, value_layers=2, tied=True, residual_gates=True),
}
OTHERS = {
    "bert": BertConfig(**SIZE),
    "transformer": TransformerConfig(**SIZE, head_bias=True),
    "transformer_untied": TransformerConfig(**SIZE, tied=False, positions="learned"),
    "t5": T5Config(**SIZE, d_ff=24),
}
ALL = DECODERS | OTHERS


def build(config, vocab_size, seed=0):
    """A small model whose every weight matters: zero-initialised ones are filled."""
    torch.manual_seed(seed)
    model = config.build(vocab_size).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(params=ALL)
def grown(request):
    config = ALL[request.param]
    old, new = build(config, OLD), build(config, NEW, seed=1)
    weights = grow_vocabulary(old.state_dict(), new, PIECES, OLD)
    new.load_state_dict(weights, strict=True)
    return old, new


@pytest.mark.parametrize("name", ALL)
def test_vocabulary_parameters_are_those_that_change_with_the_vocabulary(name) -> None:
    """Found by building the model for two sizes, far enough apart for any padding."""
    small, large = (ALL[name].build(n).state_dict() for n in (OLD, OLD + 64))
    changed = {key for key in small if small[key].shape != large[key].shape}
    assert vocabulary_parameters(ALL[name].build(OLD)) == changed


def test_new_rows_are_means_and_all_else_is_as_it_was(grown) -> None:
    old, new = grown
    before, after = old.state_dict(), new.state_dict()
    for name in vocabulary_parameters(new):
        rows, kept = after[name], before[name]
        assert rows.shape == (new.vocab_size, *kept.shape[1:])
        assert torch.equal(rows[:OLD], kept[:OLD])
        for row, ids in enumerate(PIECES, OLD):
            mean = sum(kept[i] for i in ids) / len(ids) if ids else kept[:OLD].mean(0)
            torch.testing.assert_close(rows[row], mean, atol=1e-6, rtol=0)
        assert torch.equal(rows[OLD + 1], kept[28]), "the mean of one row is that row"
        assert torch.equal(rows[NEW : len(kept)], kept[NEW:]), "padding that stays padding"
        more = rows[max(NEW, len(kept)) :]
        torch.testing.assert_close(more, kept[:OLD].mean(0).expand_as(more), atol=1e-6, rtol=0)
    for name in after.keys() - vocabulary_parameters(new):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("name", DECODERS)
def test_old_logits_stay_and_new_ones_are_means(name) -> None:
    old, new = build(DECODERS[name], OLD), build(DECODERS[name], NEW, seed=1)
    weights = grow_vocabulary(old.state_dict(), new, PIECES, OLD)
    new.load_state_dict(weights, strict=True)
    tokens = torch.randint(0, OLD, (2, 11))
    with torch.no_grad():
        hidden = new(tokens)
        before, after = old.head(old(tokens)), new.head(hidden)
        torch.testing.assert_close(after[..., :OLD], before[..., :OLD], atol=1e-6, rtol=0)
        cap = new.head.softcap
        plain = cap * torch.atanh(before / cap) if cap else before  # a cap is no linear function
        expected = torch.stack([plain[..., ids or list(range(OLD))].mean(-1) for ids in PIECES], -1)
        expected = cap * torch.tanh(expected / cap) if cap else expected
        torch.testing.assert_close(after[..., OLD:NEW], expected, atol=1e-5, rtol=0)
        assert (after[..., OLD:NEW].amax(-1) <= before[..., :OLD].amax(-1) + 1e-5).all()


@pytest.mark.parametrize("name", ["gpt", "llama_tied", "fast_tied"])
def test_tied_heads_stay_tied(name) -> None:
    old, new = build(DECODERS[name], OLD), build(DECODERS[name], NEW, seed=1)
    new.load_state_dict(grow_vocabulary(old.state_dict(), new, PIECES, OLD))
    assert new.head.weight is new.embed.weight
    assert torch.equal(new.state_dict()["head.weight"], new.state_dict()["embed.weight"])


def test_biases_and_precision() -> None:
    """bfloat16 weights stay bfloat16; a mean is rounded once."""
    model = torch.nn.Module()
    model.vocab_size = 5
    model.head = Head(4, 5, bias=True)
    weights = {"head.weight": torch.randn(3, 4).bfloat16(), "head.bias": torch.tensor([1.0, 2.0, 4.5]).bfloat16()}
    grown = grow_vocabulary(weights, model, [[0, 1, 2], [1, 2]], 3)
    assert grown["head.bias"].tolist() == [1, 2, 4.5, 2.5, 3.25]
    assert grown["head.weight"].dtype == torch.bfloat16
    assert torch.equal(grown["head.weight"][3], weights["head.weight"].double().mean(0).bfloat16())


def test_the_given_weights_are_left_alone() -> None:
    old, new = build(DECODERS["gpt_in_padding"], OLD), build(DECODERS["gpt_in_padding"], NEW, seed=1)
    weights = {name: value.clone() for name, value in old.state_dict().items()}
    grow_vocabulary(old.state_dict(), new, PIECES, OLD)
    assert all(torch.equal(value, weights[name]) for name, value in old.state_dict().items())


def test_mistakes() -> None:
    old, new = build(DECODERS["gpt"], OLD), build(DECODERS["gpt"], NEW)
    wider = build(GPTConfig(**SIZE | {"d_model": 32}), OLD).state_dict()
    with pytest.raises(UserError, match=r"embed\.weight is \(29, 32\).*29 to 33 rows of \(16,\)"):
        grow_vocabulary(wider, new, PIECES, OLD)
    longer = build(GPTConfig(**SIZE | {"max_length": 31}), OLD).state_dict()
    with pytest.raises(UserError, match=r"position\.weight is \(31, 16\).*expected \(29, 16\)"):
        grow_vocabulary(longer, new, PIECES, OLD)
    with pytest.raises(UserError, match=r"embed\.weight is \(28, 16\)"):
        grow_vocabulary(build(DECODERS["gpt"], 28).state_dict(), new, PIECES, OLD)
    with pytest.raises(UserError, match="have strange"):
        grow_vocabulary({"strange": torch.zeros(1)}, new, PIECES, OLD)
    with pytest.raises(AssertionError, match="34 token ids"):
        grow_vocabulary(old.state_dict(), new, [*PIECES, []], OLD)
    with pytest.raises(AssertionError, match="no old id"):
        grow_vocabulary(old.state_dict(), new, [[OLD]], OLD)
