"""The encoder: ModernBERT and XLM of Transformers, what sees what, packing, padding, the head, counts."""

import copy
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from lmexp.contracts import UserError
from lmexp.model.bert import BertConfig

CONF = Path(__file__).parents[2] / "conf" / "model"

PUBLISHED = BertConfig(n_layers=2, n_heads=3, d_model=24, max_length=24)
SMALL = {
    "published": PUBLISHED,
    "roberta": BertConfig(n_layers=1, n_heads=2, d_model=14, max_length=24, d_ff=20, n_segments=1, vocab_multiple=16),
    "xlm": BertConfig(
        n_layers=2, n_heads=2, d_model=10, max_length=24, n_segments=0, n_languages=3, head_transform=False
    ),
    "modern": BertConfig(
        n_layers=2,
        n_heads=3,
        d_model=24,
        max_length=24,
        d_ff=20,
        n_segments=0,
        prenorm=True,
        rope=True,
        gated=True,
        bias=False,
        norm_eps=1e-5,
    ),
    "mixed": BertConfig(n_layers=3, n_heads=2, d_model=16, max_length=24, rope=True, n_languages=2, gated=True),
    "prenorm": BertConfig(n_layers=2, n_heads=1, d_model=16, max_length=24, prenorm=True),
}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def randomize(model):
    """Weights that all matter; norms about 1, so that attention has something to choose."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            p.normal_(1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0, 0.3)
    return model


def build(name, vocab_size=29, seed=0):
    """A small model in float64 whose every weight matters."""
    torch.manual_seed(seed)
    return randomize(SMALL[name].build(vocab_size).double().eval())


def composed(name):
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    base = [d for d in own.pop("defaults", []) if d != "_self_"]
    return {**(composed(base[0]) if base else {}), **own}


def config_of(name):
    values = composed(name)
    assert values.pop("_target_") == "lmexp.model.bert.BertConfig"
    return BertConfig(**values)


def on_meta(name, vocab_size):
    with torch.device("meta"):
        return config_of(name).build(vocab_size)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_contract(name):
    model, config = build(name), SMALL[name]
    hidden = model(torch.randint(0, 29, (2, 9)))
    assert hidden.shape == (2, 9, config.d_model)
    assert model.head(hidden).shape == (2, 9, model.vocab_size)
    assert model.vocab_size == (32 if name == "roberta" else 29)
    assert (model.family, model.max_length, model.n_layers) == ("encoder", 24, config.n_layers)
    assert model.config is config
    assert BertConfig.family == "encoder"
    assert model.head.weight is model.embed.weight
    with pytest.raises(AssertionError, match="25 positions"):
        model(torch.zeros(1, 25, dtype=torch.long))


def input_gradients(model, inputs):
    """(T, T) whether each hidden state of row 0 depends on each token."""
    caught = []

    def catch(module, args, out):
        caught.append(out.detach().requires_grad_())
        return caught[-1]

    handle = model.embed.register_forward_hook(catch)
    hidden = model(**inputs)
    handle.remove()
    weights = torch.randn_like(hidden)
    rows = [
        torch.autograd.grad((hidden[0, t] * weights[0, t]).sum(), caught, retain_graph=True)[0][0].abs().sum(-1)
        for t in range(hidden.shape[1])
    ]
    return torch.stack(rows) != 0


@pytest.mark.parametrize("name", SMALL)
def test_every_position_sees_every_other(name):
    assert input_gradients(build(name), {"tokens": torch.randint(0, 29, (1, 8))}).all()


@pytest.mark.parametrize("name", SMALL)
def test_documents_see_their_own_only(name):
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1]])
    inputs = {"tokens": torch.randint(0, 29, (1, 8)), "documents": documents}
    inputs["positions"] = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1]])
    assert torch.equal(input_gradients(build(name), inputs), documents[0][:, None] == documents[0])


def extra_inputs(config, shape):
    """Random segments and languages, for models that have them."""
    tables = {"segments": config.n_segments, "languages": config.n_languages}
    return {name: torch.randint(0, n, shape) for name, n in tables.items() if n}


@pytest.mark.parametrize("name", SMALL)
def test_packed_documents_are_as_alone(name):
    model = build(name)
    lengths, padding = [5, 1, 9, 4], 3
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])[None]
    positions = torch.cat([torch.arange(n) for n in [*lengths, padding]])[None]
    tokens, extra = torch.randint(0, 29, documents.shape), extra_inputs(SMALL[name], documents.shape)
    packed = model(tokens, documents=documents, positions=positions, **extra)[:, :-padding]
    columns = torch.arange(sum(lengths)).split(lengths)
    alone = [model(tokens[:, c], **{k: v[:, c] for k, v in extra.items()}) for c in columns]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(name):
    """Rows with padding, one of them nothing else, are as alone; no gradient is lost to NaN."""
    model, lengths = build(name), [7, 4, 1, 0]
    tokens = torch.randint(0, 29, (4, 7))
    documents = -(torch.arange(7) >= torch.tensor(lengths)[:, None]).long()
    together = model(tokens, documents)
    assert together.isfinite().all()
    for row, text, n in zip(together, tokens, lengths, strict=True):
        if n:
            torch.testing.assert_close(row[:n], model(text[None, :n])[0], **EXACT)
    labels = tokens.masked_fill(documents < 0, -100)
    model.head.loss(together.flatten(0, 1), labels.flatten(), n_chunks=2).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_the_first_segment_and_language_are_the_default(name):
    model, tokens = build(name), torch.randint(0, 29, (2, 6))
    zeros = {key: torch.zeros_like(rows) for key, rows in extra_inputs(SMALL[name], (2, 6)).items()}
    torch.testing.assert_close(model(tokens), model(tokens, **zeros), **EXACT)
    for key in ("segments", "languages"):
        if key not in zeros:
            with pytest.raises(AssertionError, match=key):
                model(tokens, **{key: torch.zeros_like(tokens)})
        elif getattr(SMALL[name], f"n_{key}") > 1:
            other = model(tokens, **{**zeros, key: torch.ones_like(tokens)})
            assert not torch.allclose(other, model(tokens))


@pytest.mark.parametrize("name", ["modern", "mixed"])
def test_rotary_positions_are_relative(name):
    model, tokens = build(name), torch.randint(0, 29, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(model(tokens, positions=positions), model(tokens), **EXACT)
    shifted = model(tokens, positions=positions + torch.tensor([[3], [15]]))
    torch.testing.assert_close(shifted, model(tokens), rtol=1e-5, atol=1e-5)  # the tables are float32
    stretched = model(tokens, positions=positions * 2)
    assert (stretched - model(tokens)).abs().max() > 1e-2


def test_learned_positions_matter():
    model, tokens = build("published"), torch.randint(0, 29, (1, 9))
    order = torch.randperm(9)
    moved = model(tokens[:, order], positions=order[None])  # attention sees a set: order stands in positions alone
    torch.testing.assert_close(moved, model(tokens)[:, order], **EXACT)
    assert not torch.allclose(model(tokens[:, order]), model(tokens)[:, order])


def same_as(pairs, logits, expected, labels, loss):
    """Logits of scored positions and every gradient; `pairs`: ours with theirs, copied before."""
    scored = labels != -100
    assert expected[scored].std() > 0.1, "a test of nothing"
    assert (logits - expected)[scored].abs().max() <= 1e-4
    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for ours, theirs in pairs:
        want = torch.cat([p.grad for p in theirs])
        assert (ours.grad - want).norm() <= 1e-4 * want.norm() + 1e-5


def copied(ours, pairs):
    """Ours and theirs hold the same random numbers."""
    assert len(pairs) == len(list(ours.parameters()))
    randomize(ours)
    with torch.no_grad():
        for a, bs in pairs:
            for b, part in zip(bs, a.chunk(len(bs)), strict=True):
                b.copy_(part)


def padded_batch(vocab_size, length, first=0):
    tokens = torch.randint(first, vocab_size, (3, length))
    pad = torch.arange(length) >= torch.tensor([length, max(1, length - 4), 1])[:, None]
    labels = tokens.masked_fill(pad | (torch.rand(3, length) < 0.4), -100)
    labels[:, 0] = tokens[:, 0]
    return tokens, pad, labels


@pytest.mark.parametrize(
    ("heads", "width", "ff", "layers", "length"), [(3, 24, 37, 3, 11), (1, 10, 16, 1, 16), (5, 20, 8, 2, 1)]
)
def test_modern_is_modernbert(heads, width, ff, layers, length):
    """Of ModernBERT that looks everywhere in every layer."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ModernBertConfig"):
        pytest.skip("this version of Transformers has no ModernBERT")
    torch.manual_seed(1)
    c = BertConfig(
        layers,
        heads,
        width,
        16,
        ff,
        0,
        prenorm=True,
        rope=True,
        rope_theta=500.0,
        gated=True,
        bias=False,
        norm_eps=1e-5,
    )
    new = "layer_types" in inspect.signature(transformers.ModernBertConfig.__init__).parameters
    rope = {"rope_type": "default", "rope_theta": 500.0}
    options = {"global_rope_theta": 500.0, "global_attn_every_n_layers": 1, "reference_compile": False}
    if new:
        options = {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
        options["layer_types"] = ["full_attention"] * layers
    theirs_config = transformers.ModernBertConfig(
        vocab_size=31,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=16,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        attn_implementation="eager",
        **options,
    )
    ours, theirs = c.build(31).eval(), transformers.ModernBertForMaskedLM(theirs_config).eval()
    m, h = theirs.model, theirs.head
    modules = [(ours.embed, m.embeddings.tok_embeddings), (ours.embed_norm, m.embeddings.norm)]
    modules += [(ours.norm, m.final_norm), (ours.head.transform.dense, h.dense), (ours.head.transform.norm, h.norm)]
    for layer, (a, b) in enumerate(zip(ours.blocks, m.layers, strict=True)):
        modules += [(a.norm1, b.attn_norm)] if layer else []
        modules += [(a.norm2, b.mlp_norm), (a.attention.qkv, b.attn.Wqkv), (a.attention.output, b.attn.Wo)]
        modules += [(a.mlp.expand, b.mlp.Wi), (a.mlp.contract, b.mlp.Wo)]
    pairs = [(a.weight, [b.weight]) for a, b in modules] + [(ours.head.bias, [theirs.decoder.bias])]
    copied(ours, pairs)
    assert count(ours) == count(theirs)
    tokens, pad, labels = padded_batch(31, length)
    hidden = ours(tokens, -pad.long())
    loss = ours.head.loss(hidden.flatten(0, 1), labels.flatten(), n_chunks=2)
    same_as(pairs, ours.head(hidden), theirs(tokens, attention_mask=(~pad).long()).logits, labels, loss)


@pytest.mark.parametrize(("heads", "width", "length"), [(3, 24, 11), (1, 10, 16)])
def test_language_embeddings_are_xlms(heads, width, length):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    c = BertConfig(2, heads, width, 16, n_segments=0, n_languages=4, head_transform=False)
    theirs_config = transformers.XLMConfig(
        vocab_size=31,
        emb_dim=width,
        n_layers=2,
        n_heads=heads,
        n_langs=4,
        max_position_embeddings=16,
        pad_token_id=0,
        pad_index=0,
    )
    ours, theirs = c.build(31).eval(), transformers.XLMWithLMHeadModel(theirs_config).eval()
    t = theirs.transformer
    pairs = [
        (ours.embed.weight, [t.embeddings.weight]),
        (ours.position.weight, [t.position_embeddings.weight]),
        (ours.language.weight, [t.lang_embeddings.weight]),
        (ours.head.bias, [theirs.pred_layer.proj.bias]),
    ]
    modules = [(ours.embed_norm, [t.layer_norm_emb])]
    for i, a in enumerate(ours.blocks):
        s, f = t.attentions[i], t.ffns[i]
        modules += [(a.attention.qkv, [s.q_lin, s.k_lin, s.v_lin]), (a.attention.output, [s.out_lin])]
        modules += [(a.norm1, [t.layer_norm1[i]]), (a.norm2, [t.layer_norm2[i]])]
        modules += [(a.mlp.expand, [f.lin1]), (a.mlp.contract, [f.lin2])]
    for a, bs in modules:
        pairs += [(getattr(a, kind), [getattr(b, kind) for b in bs]) for kind in ("weight", "bias")]
    copied(ours, pairs)
    tokens, pad, labels = padded_batch(31, length, first=1)  # theirs finds lengths by the padding token
    languages = torch.randint(0, 4, tokens.shape)
    hidden = ours(tokens, -pad.long(), languages=languages)
    loss = ours.head.loss(hidden.flatten(0, 1), labels.flatten(), n_chunks=2)
    expected = theirs(tokens.masked_fill(pad, 0), attention_mask=(~pad).long(), langs=languages).logits
    same_as(pairs, ours.head(hidden), expected, labels, loss)


@pytest.mark.parametrize("n_chunks", [1, 3])
@pytest.mark.parametrize("name", ["published", "modern"])
def test_head_is_the_published_layer(name, n_chunks):
    """Layer, GELU, norm, output by the embedding, bias: by hand, with every gradient."""
    model = build(name, vocab_size=13)
    head, c = model.head, SMALL[name]
    hidden = torch.randn(10, c.d_model, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 13, (10,))
    labels[[2, 7]] = -100

    def by_hand(x):
        t = head.transform
        x = x @ t.dense.weight.T + (t.dense.bias if c.bias else 0)
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + c.norm_eps).sqrt()
        x = x * t.norm.weight + (t.norm.bias if c.bias else 0)
        return x @ model.embed.weight.T + head.bias

    torch.testing.assert_close(head(hidden), by_hand(hidden), **EXACT)
    wanted = [hidden, model.embed.weight, *(p for name, p in head.named_parameters() if name != "weight")]
    assert len(wanted) == (7 if c.bias else 5)
    loss = head.loss(hidden, labels, n_chunks=n_chunks)
    losses = -by_hand(hidden).log_softmax(-1)[torch.arange(10), labels.clamp_min(0)] * (labels != -100)
    torch.testing.assert_close(loss, losses.sum(), **EXACT)
    gradients, expected = torch.autograd.grad(loss, wanted), torch.autograd.grad(losses.sum(), wanted)
    torch.testing.assert_close(gradients, expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(head.loss(hidden, labels, n_chunks, "none"), losses, **EXACT)


def test_loss_of_gathered_positions_is_the_whole():
    """The head costs scored positions only: gathering them first changes nothing."""
    model, tokens = build("published"), torch.randint(0, 29, (2, 9))
    labels = tokens.masked_fill(torch.rand(2, 9) < 0.7, -100)
    hidden = model(tokens)
    whole = model.head.loss(hidden.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model.head.loss(hidden[labels != -100], labels[labels != -100]), whole, **EXACT)


# name: vocabulary, Transformers' class and what its config changes, parameters of the released weights but for poolers
RELEASED = {
    "bert_base": (30522, "Bert", {}, 109_514_298),
    "bert_large": (
        30522,
        "Bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        335_174_458,
    ),
    "mbert": (119547, "Bert", {}, 177_974_523),
    "roberta_base": (50265, "Roberta", {"max_position_embeddings": 514, "type_vocab_size": 1}, 124_697_433),
    "xlm_r_base": (250002, "XLMRoberta", {"max_position_embeddings": 514, "type_vocab_size": 1}, 278_295_186),
}


@pytest.mark.parametrize("name", RELEASED)
def test_published_sizes(name):
    transformers = pytest.importorskip("transformers")
    vocab_size, kind, change, released = RELEASED[name]
    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")(vocab_size=vocab_size, **change)
        theirs = getattr(transformers, f"{kind}ForMaskedLM")(config)
    ours = on_meta(name, vocab_size)
    unused = 0 if kind == "Bert" else 2 * 768  # places begin at row 2 of their table
    assert count(theirs) == released
    assert count(ours) == released - unused
    c = ours.config
    assert (c.n_layers, c.n_heads, c.d_model, c.ff_width, c.max_length, c.n_segments) == (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.intermediate_size,
        512,
        config.type_vocab_size,
    )


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("bert_base", 30522, 110),  # Devlin et al. 2019, section 3
        ("bert_large", 30522, 340),
        ("roberta_base", 50265, 125),  # the authors' release
        ("xlm_r_base", 250002, 270),  # Conneau et al. 2020, section 3
        ("xlm_15", 95000, 250),  # Lample & Conneau's, counted by Conneau et al. 2020
    ],
)
def test_sizes_are_the_papers(name, vocab_size, millions):
    model = on_meta(name, vocab_size)
    head = sum(p.numel() for p in model.head.parameters()) - model.embed.weight.numel()  # papers count encoders
    assert abs((count(model) - head) / 1e6 / millions - 1) < 0.03


def test_xlm_15_is_as_large_as_theirs():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.XLMConfig(vocab_size=95000, emb_dim=1024, n_layers=12, n_heads=8, n_langs=15)
        theirs = transformers.XLMWithLMHeadModel(config)
    assert count(on_meta("xlm_15", 95000)) == count(theirs)


def test_modern_is_about_as_large():
    assert abs(count(on_meta("bert_modern", 8000)) / count(on_meta("bert", 8000)) - 1) < 0.05


def test_every_config_builds():
    names = [path.stem for path in CONF.glob("*.yaml") if "BertConfig" in composed(path.stem)["_target_"]]
    assert {"bert", "bert_modern", "xlm_15", *RELEASED} <= {*names}
    for name in names:
        assert on_meta(name, 1000).max_length == composed(name)["max_length"]


def test_flops():
    d, ff, length = 24, 96, 10
    norms, attention, feed_forward = 2 * 2 * d, 4 * (d * d + d), 2 * d * ff + d + ff
    body = 2 * d + 2 * (norms + attention + feed_forward)  # the tables are looked up
    head = d * d + d + 2 * d + 29 * d + 29
    mixing = 12 * 2 * length * d
    model = PUBLISHED.build(29)
    assert model.flops_per_token(length) == 6 * (body + head) + mixing
    assert model.flops_per_token(length, scored=0.25) == 6 * (body + 0.25 * head) + mixing


def test_init():
    torch.manual_seed(0)
    model = BertConfig(n_layers=2, n_heads=4, d_model=128, max_length=64, n_languages=3).build(500)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    for name, p in matrices.items():
        assert abs(p.std() / 0.02 - 1) < (0.2 if p.numel() < 1000 else 0.03), name
    for name, p in model.named_parameters():
        if name not in matrices:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("key", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("name", ["published", "modern"])
def test_dropout_only_in_training(name, key):
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    model = replace(SMALL[name], **(none | {key: 0.5})).build(29)
    tokens = torch.randint(0, 29, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model = replace(SMALL[name], **none).build(29)
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layers", 0),
        ("n_heads", 5),
        ("d_ff", 0),
        ("n_segments", -1),
        ("n_languages", -1),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("norm_eps", 0.0),
        ("init_std", 0.0),
        ("rope_theta", 0.0),
        ("max_length", 0),
        ("vocab_multiple", 0),
    ],
)
def test_bad_shapes_are_refused(key, value):
    with pytest.raises(UserError, match=f"model.*{key}"):
        replace(PUBLISHED, **{key: value})


def test_rotary_heads_have_even_width():
    with pytest.raises(UserError, match="odd width"):
        BertConfig(n_layers=1, n_heads=2, d_model=14, max_length=8, rope=True)


def test_a_copy_is_still_tied():
    model = build("published")
    other = copy.deepcopy(model)
    assert other.head.weight is other.embed.weight
    other.load_state_dict(model.state_dict())
    assert isinstance(other.head, nn.Module)
    assert other.head.weight is other.embed.weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["published", "modern", "xlm"])
def test_compiled_in_place(name):
    plain, compiled = build(name).float(), build(name).float()
    compiled.compile()
    compiled.head.compile()
    tokens = torch.randint(0, 29, (2, 9))
    documents = torch.tensor([[0] * 9, [0] * 4 + [-1] * 5])
    for model in (plain, compiled):
        for n_chunks in (1, 3):
            hidden = model(tokens, documents)
            model.head.loss(hidden.flatten(0, 1), tokens.flatten(), n_chunks=n_chunks).backward()
    hidden = plain(tokens, documents)
    torch.testing.assert_close(compiled.head(hidden), plain.head(hidden), rtol=1e-3, atol=1e-3)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    SMALL[name].build(29).load_state_dict(compiled.state_dict())
