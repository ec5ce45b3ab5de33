"""Every decoder: parity with Transformers, causality, packing, caching, parameter counts, compiling."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lmexp.contracts import UserError
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.llama import LlamaConfig

CONF = Path(__file__).parents[2] / "conf" / "model"

SMALL = {
    "gpt": GPTConfig(n_layers=2, n_heads=3, d_model=24, max_length=24),
    "gpt_plain": GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=24, bias=False),
    "llama": LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, d_ff=40, d_head=8, max_length=24),
    "llama_tied": LlamaConfig(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=24, tied=True),
    "fast": FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=24),
    "fast_all": FastConfig(
        n_layers=3,
        n_heads=2,
        d_model=16,
        max_length=24,
        d_ff=24,
        tied=True,
        value_layers=2,
        residual_gates=True,
        attention_scale=0.3,
        softcap=None,
        vocab_multiple=16,
    ),
    "fast_bare": FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=24, qk_norm=False, zero_init=False),
}


def build(name, vocab_size=29, seed=0):
    """A small model in float64 whose every weight matters: zero-initialised ones are filled."""
    torch.manual_seed(seed)
    model = SMALL[name].build(vocab_size).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def composed(name):
    """A model config as Hydra composes it: the yaml over the one it names under `defaults`."""
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    base = [d for d in own.pop("defaults", []) if d != "_self_"]
    assert len(base) <= 1
    values = {**(composed(base[0]) if base else {}), **own}
    return values


def config_of(name):
    values = composed(name)
    owner = {"gpt": GPTConfig, "llama": LlamaConfig, "fast": FastConfig}[values.pop("_target_").split(".")[2]]
    return owner(**values)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_contract(name):
    model = build(name)
    hidden = model(torch.randint(0, 29, (2, 9)))
    assert hidden.shape == (2, 9, SMALL[name].d_model)
    assert model.head(hidden).shape == (2, 9, model.vocab_size)
    assert model.vocab_size == (32 if name == "fast_all" else 29)
    assert model.max_length == 24
    with pytest.raises(AssertionError, match="25 positions"):
        model(torch.zeros(1, 25, dtype=torch.long))


def input_gradients(model, inputs):
    """(T, T) size of d hidden[t] / d embedding[s], from gradients at the embeddings looked up."""
    caught = []

    def catch(module, args, out):
        out.requires_grad_()
        caught.append(out)

    handles = [m.register_forward_hook(catch) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for p in model.parameters():
        p.requires_grad_(False)
    hidden = model(**inputs)
    for handle in handles:
        handle.remove()
    caught = [x for x in caught if x.shape[1] == hidden.shape[1]]
    weights = torch.randn_like(hidden)
    rows = []
    for t in range(hidden.shape[1]):
        grads = torch.autograd.grad((hidden[0, t] * weights[0, t]).sum(), caught, retain_graph=True)
        rows.append(sum(g[0].abs().sum(-1) for g in grads))
    return torch.stack(rows)


@pytest.mark.parametrize("name", SMALL)
def test_no_position_sees_a_later_one(name):
    seen = input_gradients(build(name), {"tokens": torch.randint(0, 29, (1, 8))}) != 0
    assert torch.equal(seen, torch.ones(8, 8, dtype=torch.bool).tril())


@pytest.mark.parametrize("name", SMALL)
def test_no_position_sees_another_document(name):
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    inputs = {"tokens": torch.randint(0, 29, (1, 8)), "documents": documents, "positions": positions}
    seen = input_gradients(build(name), inputs) != 0
    assert torch.equal(seen, torch.ones(8, 8, dtype=torch.bool).tril() & (documents[0][:, None] == documents[0]))


@pytest.mark.parametrize("name", SMALL)
def test_packed_documents_are_as_alone(name):
    model = build(name)
    lengths = [5, 1, 9, 4]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = torch.randint(0, 29, documents.shape)
    packed = model(tokens, documents=documents, positions=positions)
    alone = [model(part) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_cached_pieces_are_the_whole(name):
    model = build(name)
    tokens = torch.randint(0, 29, (2, 20))
    cache = model.new_cache(2, 20, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in tokens.split((6, 1, 1, 5, 1, 6), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)
    assert cache.length == 20


def transformers_gpt2(c, vocab_size):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=c.max_length, n_embd=c.d_model, n_layer=c.n_layers, n_head=c.n_heads
    )
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config).eval()


def copy_gpt2(ours, theirs):
    """Copy weights, theirs (`Conv1D`, transposed) to ours; returns pairs of parameters, with whether to transpose."""
    t = theirs.transformer
    pairs = [(ours.embed.weight, t.wte.weight, False), (ours.position.weight, t.wpe.weight, False)]
    modules = [(ours.norm, t.ln_f, False)]
    for a, b in zip(ours.blocks, t.h, strict=True):
        modules += [(a.norm1, b.ln_1, False), (a.norm2, b.ln_2, False)]
        modules += [(a.attention.qkv, b.attn.c_attn, True), (a.attention.output, b.attn.c_proj, True)]
        modules += [(a.mlp.expand, b.mlp.c_fc, True), (a.mlp.contract, b.mlp.c_proj, True)]
    for a, b, transpose in modules:
        pairs += [(a.weight, b.weight, transpose), (a.bias, b.bias, False)]
    assert len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for a, b, transpose in pairs:
            b.normal_(std=0.2)
            a.copy_(b.T if transpose else b)
    return pairs


def same_gradients(ours, theirs, pairs, vocab_size, length):
    tokens = torch.randint(0, vocab_size, (2, length + 1))
    logits = ours.head(ours(tokens[:, :-1]))
    expected = theirs(tokens[:, :-1]).logits
    assert (logits - expected).abs().max() <= 1e-4
    ours.head.loss(ours(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), n_chunks=3).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for a, b, transpose in pairs:
        want = b.grad.T if transpose else b.grad
        assert (a.grad - want).norm() <= 1e-4 * want.norm() + 1e-5


@pytest.mark.parametrize(("n_heads", "d_model", "length"), [(3, 24, 11), (1, 10, 16), (5, 40, 1)])
def test_gpt_is_gpt2(n_heads, d_model, length):
    torch.manual_seed(1)
    config = GPTConfig(n_layers=3, n_heads=n_heads, d_model=d_model, max_length=16)
    ours, theirs = config.build(31), transformers_gpt2(config, 31)
    same_gradients(ours, theirs, copy_gpt2(ours, theirs), 31, length)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d_head", "tied", "theta", "length"),
    [(4, 4, None, False, 1e4, 16), (4, 2, None, True, 5e5, 7), (6, 1, 10, False, 100.0, 13), (3, 3, 4, True, 1e4, 2)],
)
def test_llama_is_llama(heads, kv_heads, d_head, tied, theta, length):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = LlamaConfig(
        n_layers=2,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_model=24,
        d_ff=37,
        d_head=d_head,
        max_length=16,
        tied=tied,
        rope_theta=theta,
        norm_eps=1e-4,
    )
    theirs_config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.head_width,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-4,
        rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="eager",
    )
    ours, theirs = config.build(31), transformers.LlamaForCausalLM(theirs_config).eval()
    t = theirs.model
    pairs = [(ours.embed.weight, [t.embed_tokens.weight]), (ours.norm.weight, [t.norm.weight])]
    if not tied:
        pairs.append((ours.head.weight, [theirs.lm_head.weight]))
    for a, b in zip(ours.blocks, t.layers, strict=True):
        s, m = b.self_attn, b.mlp
        pairs += [
            (a.norm1.weight, [b.input_layernorm.weight]),
            (a.norm2.weight, [b.post_attention_layernorm.weight]),
            (a.attention.qkv.weight, [s.q_proj.weight, s.k_proj.weight, s.v_proj.weight]),
            (a.attention.output.weight, [s.o_proj.weight]),
            (a.mlp.expand.weight, [m.gate_proj.weight, m.up_proj.weight]),
            (a.mlp.contract.weight, [m.down_proj.weight]),
        ]
    assert len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for a, bs in pairs:
            for b in bs:
                b.normal_(std=0.2)
            a.copy_(torch.cat(bs))
    tokens = torch.randint(0, 31, (2, length + 1))
    expected = theirs(tokens[:, :-1]).logits
    assert (ours.head(ours(tokens[:, :-1])) - expected).abs().max() <= 1e-4
    ours.head.loss(ours(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for a, bs in pairs:
        want = torch.cat([b.grad for b in bs])
        assert (a.grad - want).norm() <= 1e-4 * want.norm() + 1e-5


PUBLISHED = {
    # name: (vocabulary, parameters of the released weights)
    "gpt2": (50257, 124_439_808),
    "gpt2_medium": (50257, 354_823_168),
    "gpt2_large": (50257, 774_030_080),
    "gpt2_xl": (50257, 1_557_611_200),
    "smollm2_135m": (49152, 134_515_008),
    "tinyllama_1b": (32000, 1_100_048_384),
    "llama2_7b": (32000, 6_738_415_616),
    "llama3_8b": (128256, 8_030_261_248),
}


def on_meta(name, vocab_size):
    with torch.device("meta"):
        return config_of(name).build(vocab_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    vocab_size, expected = PUBLISHED[name]
    assert sum(p.numel() for p in on_meta(name, vocab_size).parameters()) == expected


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt3_small", 0.125),
        ("gpt3_medium", 0.356),
        ("gpt3_large", 0.76),
        ("gpt3_xl", 1.3),
        ("gpt3_2p7b", 2.65),
        ("gpt3_6p7b", 6.7),
        ("gpt3_13b", 12.85),
        ("gpt3_175b", 174.6),
    ],
)
def test_gpt3_sizes(name, billions):
    # table 2.1 rounds; appendix D gives 356M, 2.65B, 6.66B, 12.85B and 174.6B (table D.1)
    model = on_meta(name, 50257)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e9 - billions) < 0.015 * billions
    c = model.config
    d, layers = c.d_model, c.n_layers
    assert count == 50257 * d + 2048 * d + layers * (12 * d * d + 13 * d) + 2 * d


def test_every_config_builds():
    for path in sorted(CONF.glob("*.yaml")):
        values = composed(path.stem)
        if values["_target_"].split(".")[2] in ("gpt", "llama", "fast"):
            assert on_meta(path.stem, 1000).max_length == values["max_length"]


def test_fast_nano_is_as_large_as_nanogpt():
    # 4 layers of 12 D^2 + 2 D, a final norm, 64 positions, 65 tied rows: its CPU run's model without biases
    nanogpt = 4 * (12 * 128**2 + 2 * 128) + 128 + 64 * 128 + 65 * 128
    assert nanogpt == 804_096
    ours = sum(p.numel() for p in config_of("fast_nano").build(66).parameters())
    assert abs(ours / nanogpt - 1) < 0.02


def test_flops():
    model = GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=24, bias=False).build(29)
    matmuls = 2 * 12 * 16**2 + 29 * 16 + 5 * 16  # blocks, head, and the five norms that come with them
    assert model.flops_per_token(24) == 6 * matmuls + 12 * 2 * 16 * 24
    untied = LlamaConfig(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=24).build(29)
    tied = LlamaConfig(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=24, tied=True).build(29)
    assert untied.flops_per_token(8) == tied.flops_per_token(8)


def test_zero_init_is_the_identity():
    model = SMALL["fast"].build(29)
    tokens = torch.randint(0, 29, (2, 6))
    x = model.embed(tokens)
    torch.testing.assert_close(model(tokens), x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)


def test_gpt2_init():
    model = GPTConfig(n_layers=8, n_heads=4, d_model=128, max_length=64).build(500)
    assert abs(model.embed.weight.std() - 0.02) < 5e-4
    assert abs(model.blocks[3].mlp.contract.weight.std() - 0.02 / 4) < 2e-4
    assert abs(model.blocks[3].mlp.expand.weight.std() - 0.02) < 5e-4


@pytest.mark.parametrize("make", [GPTConfig, partial(FastConfig, zero_init=False)])
def test_dropout_only_in_training(make):
    model = make(n_layers=2, n_heads=2, d_model=16, max_length=24, dropout=0.5).build(29)
    tokens = torch.randint(0, 29, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPTConfig(n_layers=2, n_heads=3, d_model=16, max_length=8),
        lambda: GPTConfig(n_layers=0, n_heads=2, d_model=16, max_length=8),
        lambda: GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=8, dropout=1.0),
        lambda: LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=3, d_model=16, d_ff=8, max_length=8),
        lambda: FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=8, value_layers=3),
        lambda: FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=8, softcap=0),
    ],
)
def test_bad_shapes_are_refused(make):
    with pytest.raises(UserError, match="model"):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "fast_all"])
def test_compiled_in_place(name):
    plain, compiled = build(name).float(), build(name).float()
    compiled.compile()
    compiled.head.compile()
    tokens = torch.randint(0, 29, (2, 9))
    for model in (plain, compiled):
        model.head.loss(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    SMALL[name].build(29).load_state_dict(compiled.state_dict())
