"""Generation against plain forward passes, and sampling against its definitions."""

from typing import Any

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.decoding.generate import Sampling, distribution, generate, next_tokens
from lmexp.decoding.steps import weights_for
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.layers import Head
from lmexp.model.llama import LlamaConfig
from lmexp.model.t5 import T5Config

MODELS = {
    "gpt": GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=16, vocab_multiple=16),
    "llama": LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, d_ff=24, max_length=16, vocab_multiple=16),
    "fast": FastConfig(
        n_layers=2, n_heads=2, d_model=16, max_length=16, vocab_multiple=16, value_layers=1, residual_gates=True
    ),
}
VOCAB, EOS = 29, 0
PROMPTS = [[5], [7, 8, 9, 10], [3, 1, 4, 1, 5, 9, 2, 6, 5], [11, 12]]


def build(name):
    torch.manual_seed(3)
    model = MODELS[name].build(VOCAB).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.6)
    return model.eval()


def plain(model, prompt, n):
    """Greedy tokens from whole forward passes over the last `max_length` tokens."""
    tokens = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            hidden = model(torch.tensor([tokens[-model.max_length :]]))
            tokens.append(model.head(hidden[0, -1])[:VOCAB].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_whole_forward(name):
    model = build(name)
    n = 24  # beyond max_length: the window slides
    batched = generate(model, PROMPTS, Sampling(temperature=0, max_new_tokens=n), None, VOCAB)
    for prompt, tokens in zip(PROMPTS, batched, strict=True):
        assert tokens == plain(model, prompt, n)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_longer_than_the_context(name):
    model = build(name)
    prompts = [[i % VOCAB for i in range(21)], [4, 5]]
    got = generate(model, prompts, Sampling(temperature=0, max_new_tokens=4), None, VOCAB)
    assert got == [plain(model, prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_their_batch(name):
    model = build(name)
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.95, max_new_tokens=20, seed=7)
    batched = generate(model, PROMPTS, sampling, None, VOCAB)
    single = [generate(model, [p], sampling, None, VOCAB, numbers=[i])[0] for i, p in enumerate(PROMPTS)]
    assert batched == single
    assert batched == generate(model, PROMPTS, sampling, None, VOCAB)
    assert batched != generate(model, PROMPTS, Sampling(temperature=1.3, max_new_tokens=20, seed=8), None, VOCAB)
    twins = generate(model, [PROMPTS[0]] * 2, sampling, None, VOCAB)
    assert twins[0] != twins[1]
    assert max(max(row) for row in batched) < VOCAB


def test_stops_and_streams():
    model = build("fast")
    sampling = Sampling(temperature=2.0, max_new_tokens=60, seed=1)
    heard = [[] for _ in PROMPTS]
    rows = generate(model, PROMPTS, sampling, EOS, VOCAB, on_token=lambda row, token: heard[row].append(token))
    assert heard == rows
    assert any(row[-1] == EOS for row in rows)
    assert all(EOS not in row[:-1] for row in rows)
    going = generate(
        model, PROMPTS, Sampling(temperature=2.0, max_new_tokens=60, seed=1, stop_at_eos=False), EOS, VOCAB
    )
    for short, long in zip(rows, going, strict=True):
        assert long[: len(short)] == short
        assert len(long) == 60


def test_mode_is_left_as_it_was():
    model = build("gpt").train()
    generate(model, [[1]], Sampling(max_new_tokens=1), None, VOCAB)
    assert model.training


def test_no_prompts_and_empty_prompts():
    assert generate(build("gpt"), [], Sampling(), None, VOCAB) == []
    with pytest.raises(UserError, match="prompt 1"):
        generate(build("gpt"), [[1], []], Sampling(), None, VOCAB)


def brute_force(logits, temperature, top_k, top_p):
    """Probabilities of one row by sets: the k likeliest, then the fewest that reach top_p together."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    kept_mass = sum(p[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += p[i] / kept_mass
        if top_p is not None and reached >= top_p:
            break
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
def test_distribution_is_its_definition(temperature, top_k, top_p):
    logits = torch.randn(6, 17, generator=torch.Generator().manual_seed(0)) * 2
    p, ids = distribution(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    got = torch.zeros_like(p).scatter(-1, ids, p)
    expected = torch.tensor([brute_force(row, temperature, top_k, top_p) for row in logits])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_draws_follow_the_distribution():
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    n = 20_000
    drawn = next_tokens(logits.expand(n, -1), Sampling(seed=5, top_k=6), [(i // 100, i % 100) for i in range(n)])
    p, ids = distribution(logits, Sampling(top_k=6))
    expected = torch.zeros(9).scatter(-1, ids[0], p[0])
    share = torch.bincount(drawn, minlength=9) / n
    assert (share - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert (share[expected == 0] == 0).all()


def test_temperature_to_zero_is_greedy():
    logits = torch.randn(50, 17) * 5
    places = [(i, 0) for i in range(50)]
    cold = next_tokens(logits, Sampling(temperature=1e-6), places)
    assert torch.equal(cold, next_tokens(logits, Sampling(temperature=0), places))
    assert torch.equal(cold, logits.argmax(-1))


@pytest.mark.parametrize("field", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_bad_values_are_refused(field):
    with pytest.raises(UserError, match=next(iter(field))):
        Sampling(**field)


def test_weights_are_stored_as_before_afterwards() -> None:
    model: Any = GPTConfig(n_layers=1, n_heads=2, d_model=16, max_length=32).build(50).eval()
    before = {name: (p.data_ptr(), p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = model.head(model(tokens))
        with weights_for(model, 1):
            assert model.blocks[0].mlp.expand.weight.stride() == (1, 64)
            assert model.embed.weight.is_contiguous()  # the head's, and looked up by rows
            assert model.head.packed is not None
            torch.testing.assert_close(model.head(model(tokens)), expected, rtol=1e-5, atol=1e-6)
    generate(model, [[1, 2], [3]], Sampling(temperature=0, max_new_tokens=4), None, 50)
    for name, p in model.named_parameters():
        place, stride, value = before[name]
        assert (p.data_ptr(), p.stride()) == (place, stride)
        assert torch.equal(p, value)
    assert model.head.packed is None
    model.head(model(tokens)).sum().backward()


def test_only_the_half_that_writes_is_stored_anew() -> None:
    model: Any = T5Config(n_layers=1, n_heads=2, d_model=16, d_ff=24, max_length=32).build(50).eval()
    with weights_for(model, 2):
        assert model.decoder.blocks[0].mlp.expand.weight.stride() == (1, 24)
        assert model.encoder.blocks[0].mlp.expand.weight.is_contiguous()
    assert all(p.is_contiguous() for p in model.parameters())
    assert model.head.packed is None


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_logits_of_a_packed_head_are_its_own(rows: int) -> None:
    head = Head(16, 70, bias=True, softcap=3.0)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(rows, 16)
    with torch.no_grad():
        expected = head(hidden)
        head.pack(4)
        assert head.packed is not None
        torch.testing.assert_close(head(hidden), expected)


def test_what_is_not_float32_is_not_packed() -> None:
    head = Head(16, 70)
    with torch.autocast("cpu", torch.bfloat16):
        head.pack(4)
    head.double().pack(4)
    assert head.packed is None
