"""Log-likelihoods against the whole softmax of single rows, one forward pass each, in float64."""

import itertools

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.decoding.score import log_likelihoods
from lmexp.model.bert import BertConfig
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.llama import LlamaConfig
from lmexp.model.t5 import T5Config
from lmexp.model.transformer import TransformerConfig

SMALL = {"n_layers": 2, "n_heads": 2, "d_model": 16, "max_length": 16}
DECODERS = {
    "gpt": GPTConfig(**SMALL, vocab_multiple=16),
    "llama": LlamaConfig(**{**SMALL, "n_heads": 4}, n_kv_heads=2, d_ff=24),
    "fast": FastConfig(**SMALL, value_layers=1, residual_gates=True),
}
ENCODER_DECODERS = {
    "t5": T5Config(**SMALL, d_ff=24, decoder_start_id=3),
    "transformer": TransformerConfig(**SMALL, d_ff=24),
}
ENCODERS = {"bert": BertConfig(**SMALL), "bert_modern": BertConfig(**SMALL, prenorm=True, rope=True, gated=True)}
VOCAB, MASK, END = 29, 28, 0
PAIRS = [
    ((5,), (7,)),
    ((7, 8, 9, 10), (1, 2, 3)),
    ((3, 1, 4, 1, 5, 9, 2, 6, 5), (3, 5, 8, 9, 7)),
    ((11, 12), (13, 14, 15, 16, 17, 18, 19, 20)),
    ((7, 8, 9, 10), (1, 2)),
    ((5,), (7,)),
]


def build(config):
    torch.manual_seed(3)
    model = config.build(VOCAB).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.6)
    return model.eval()


@torch.no_grad()
def brute_force(model, prompt, continuation, prefix_lm=False, end=()):
    """A token at a time, each from the softmax over the whole vocabulary."""
    total = 0.0
    for n, token in enumerate(continuation):
        if model.family == "encoder_decoder":
            written = [model.decoder_start_id, *continuation[:n]]
            hidden = model(torch.tensor([prompt]), torch.tensor([written]))[0, -1]
        elif model.family == "encoder":
            text = [*prompt, *continuation, *end]
            text[len(prompt) + n] = MASK
            hidden = model(torch.tensor([text]))[0, len(prompt) + n]
        else:
            more = {"prefix": torch.tensor([len(prompt)])} if prefix_lm else {}
            hidden = model(torch.tensor([[*prompt, *continuation[:n]]]), **more)[0, -1]
        total += model.head(hidden).log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("config", [*DECODERS.values(), *ENCODER_DECODERS.values()], ids=[*DECODERS, *ENCODER_DECODERS])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_likelihood_is_the_product_over_tokens(config, batch_size):
    model = build(config)
    got = log_likelihoods(model, PAIRS, batch_size)
    assert got == pytest.approx([brute_force(model, *pair) for pair in PAIRS], rel=1e-11)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_is_seen_both_ways(name):
    model = build(DECODERS[name])
    got = log_likelihoods(model, PAIRS, 3, prefix_lm=True)
    assert got == pytest.approx([brute_force(model, *pair, prefix_lm=True) for pair in PAIRS], rel=1e-11)
    causal = log_likelihoods(model, PAIRS, 3)
    assert got[0] == pytest.approx(causal[0])  # of one token there are no two ways
    assert abs(got[2] - causal[2]) > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_pseudo_likelihood_masks_each_token_in_turn(name, batch_size):
    model = build(ENCODERS[name])
    got = log_likelihoods(model, PAIRS, batch_size, mask_id=MASK, end=(END,))
    assert got == pytest.approx([brute_force(model, *pair, end=(END,)) for pair in PAIRS], rel=1e-11)


@pytest.mark.parametrize("config", [DECODERS["gpt"], ENCODER_DECODERS["t5"]], ids=["gpt", "t5"])
def test_the_probabilities_of_all_continuations_sum_to_one(config):
    model = build(config)
    every = itertools.product(range(model.vocab_size), repeat=2)
    scores = log_likelihoods(model, [((4, 9, 2), pair) for pair in every], 256)
    assert torch.tensor(scores, dtype=torch.float64).exp().sum().item() == pytest.approx(1, rel=1e-11)


def test_mode_and_errors():
    model = build(DECODERS["gpt"]).train()
    assert log_likelihoods(model, [], 4) == []
    assert len(log_likelihoods(model, [((1,) * 12, (2,) * 5)], 4)) == 1  # the last token is not read
    assert model.training
    for pair, message in ((((1,) * 12, (2,) * 6), "17 tokens"), (((), (1,)), "no tokens"), (((1,), ()), "no tokens")):
        with pytest.raises(UserError, match=message):
            log_likelihoods(model, [pair], 4)
    with pytest.raises(UserError, match="18 tokens"):
        log_likelihoods(build(ENCODERS["bert"]), [((1,) * 12, (2,) * 5)], 4, mask_id=MASK, end=(END,))
