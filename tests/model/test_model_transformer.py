"""The encoder-decoder: torch.nn.Transformer, what sees what, packing, caching, counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from lmexp.contracts import UserError
from lmexp.model.kv_cache import Across, Visible, see_across
from lmexp.model.transformer import TransformerConfig, sinusoids

CONF = Path(__file__).parents[2] / "conf" / "model"

PUBLISHED = TransformerConfig(n_layers=2, n_heads=3, d_model=24, max_length=24)
SMALL = {
    "published": PUBLISHED,
    "prenorm": TransformerConfig(
        n_layers=1, n_heads=2, d_model=16, max_length=24, n_decoder_layers=3, d_ff=20, prenorm=True, vocab_multiple=16
    ),
    "bart": TransformerConfig(
        n_layers=2,
        n_heads=2,
        d_model=14,
        max_length=24,
        positions="learned",
        scale_embedding=False,
        embedding_norm=True,
        activation="gelu",
        tied=False,
    ),
    "marian": TransformerConfig(
        n_layers=3,
        n_heads=2,
        d_model=16,
        max_length=24,
        n_decoder_layers=1,
        positions="sinusoidal_halves",
        activation="swish",
        head_bias=True,
    ),
}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def build(name, vocab_size=29, seed=0):
    """A small model in float64 whose every weight matters."""
    torch.manual_seed(seed)
    model = SMALL[name].build(vocab_size).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def composed(name):
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    base = [d for d in own.pop("defaults", []) if d != "_self_"]
    return {**(composed(base[0]) if base else {}), **own}


def config_of(name):
    values = composed(name)
    assert values.pop("_target_") == "lmexp.model.transformer.TransformerConfig"
    return TransformerConfig(**values)


def on_meta(name, vocab_size):
    with torch.device("meta"):
        return config_of(name).build(vocab_size)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_contract(name):
    model, config = build(name), SMALL[name]
    tokens, decoder_tokens = torch.randint(0, 29, (2, 9)), torch.randint(0, 29, (2, 7))
    memory = model.encode(tokens)
    hidden = model(tokens, decoder_tokens)
    assert memory.shape == (2, 9, config.d_model)
    assert hidden.shape == (2, 7, config.d_model)
    assert torch.equal(hidden, model.decode(decoder_tokens, memory))
    assert model.head(hidden).shape == (2, 7, model.vocab_size)
    assert model.vocab_size == (32 if name == "prenorm" else 29)
    assert (model.family, model.max_length, model.decoder_start_id) == ("encoder_decoder", 24, 0)
    assert (model.n_layers, len(model.decoder.blocks)) == (config.n_layers, config.decoder_layers)
    assert (model.embed.weight is model.head.weight) == (model.embed is model.decoder_embed) == config.tied
    for long in ((torch.zeros(1, 25, dtype=torch.long), decoder_tokens[:1]), (tokens, torch.zeros(2, 25).long())):
        with pytest.raises(AssertionError, match="25 positions"):
            model(*long)


def torch_transformer(c):
    """torch.nn.Transformer of the same shape; left to itself it ends post-norm stacks in another norm."""
    dims = {"d_model": c.d_model, "nhead": c.n_heads, "dim_feedforward": c.ff_width, "dropout": 0.0}
    dims |= {"batch_first": True, "norm_first": c.prenorm}
    norms = [nn.LayerNorm(c.d_model) if c.prenorm else None for _ in range(2)]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**dims), c.n_layers, norms[0], enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**dims), c.decoder_layers, norms[1])
    return nn.Transformer(**dims, custom_encoder=encoder, custom_decoder=decoder).double()


def torch_pairs(ours, theirs):
    """Our parameters in the blocks, each with those of torch.nn.Transformer that hold the same numbers."""
    modules = []
    for side in ("encoder", "decoder"):
        a, b = getattr(ours, side), getattr(theirs, side)
        if ours.config.prenorm:
            modules.append((a.norm, b.norm))
        for x, y in zip(a.blocks, b.layers, strict=True):
            modules += [(x.norm1, y.norm1), (x.norm2, y.norm2), (x.mlp.expand, y.linear1), (x.mlp.contract, y.linear2)]
            modules += [(x.attention.output, y.self_attn.out_proj)]
            if side == "decoder":
                modules += [(x.norm3, y.norm3), (x.cross.output, y.multihead_attn.out_proj)]
    pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in modules for kind in ("weight", "bias")]
    fused = []
    for side in ("encoder", "decoder"):
        for x, y in zip(getattr(ours, side).blocks, getattr(theirs, side).layers, strict=True):
            for kind in ("weight", "bias"):
                fused.append(([getattr(x.attention.qkv, kind)], getattr(y.self_attn, f"in_proj_{kind}")))
                if side == "decoder":
                    parts = [getattr(x.cross.q, kind), getattr(x.cross.kv, kind)]
                    fused.append((parts, getattr(y.multihead_attn, f"in_proj_{kind}")))
    return [([a], b) for a, b in pairs] + fused


def brute_force_positions(length, d_model):
    table = torch.empty(length, d_model, dtype=torch.float64)
    for place in range(length):
        for i in range(d_model):
            angle = torch.tensor(place / 10000 ** (2 * (i // 2) / d_model), dtype=torch.float64)
            table[place, i] = angle.cos() if i % 2 else angle.sin()
    return table


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "layers", "source", "target"), [(3, 24, (2, 3), 11, 7), (1, 10, (1, 1), 1, 5)]
)
def test_is_torch_transformer(prenorm, heads, width, layers, source, target):
    torch.manual_seed(1)
    config = TransformerConfig(
        layers[0], heads, width, 16, n_decoder_layers=layers[1], d_ff=37, prenorm=prenorm, dropout=0.0
    )
    ours, theirs = config.build(31).double(), torch_transformer(config)
    pairs = torch_pairs(ours, theirs)
    assert sum(len(a) for a, _ in pairs) == len(list(ours.parameters())) - 1  # but the embedding
    with torch.no_grad():
        ours.embed.weight.normal_(std=0.3)
        for parts, b in pairs:
            b.normal_(std=0.3)
            for a, value in zip(parts, b.split([len(part) for part in parts]), strict=True):
                a.copy_(value)
    tokens, decoder_tokens = torch.randint(0, 31, (3, source)), torch.randint(0, 31, (3, target))
    lengths, decoder_lengths = torch.tensor([source, 1, (source + 1) // 2]), torch.tensor([target, target - 3, 1])
    pad = torch.arange(source) >= lengths[:, None]
    decoder_pad = torch.arange(target) >= decoder_lengths[:, None]
    labels = torch.randint(0, 31, (3, target)).masked_fill(decoder_pad, -100)
    table = brute_force_positions(16, width)

    hidden = ours(tokens, decoder_tokens, -pad.long(), decoder_documents=-decoder_pad.long())
    ours.head.loss(hidden.flatten(0, 1), labels.flatten(), n_chunks=2).backward()
    gradients = [ours.embed.weight.grad] + [torch.cat([a.grad for a in parts]) for parts, _ in pairs]
    embedding = ours.embed.weight.detach().requires_grad_()
    expected = theirs(
        F.embedding(tokens, embedding) * width**0.5 + table[:source],
        F.embedding(decoder_tokens, embedding) * width**0.5 + table[:target],
        tgt_mask=torch.ones(target, target, dtype=torch.bool).triu(1),
        src_key_padding_mask=pad,
        memory_key_padding_mask=pad,
    )
    logits = expected @ embedding.T
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    real = ~decoder_pad
    torch.testing.assert_close(ours.head(hidden)[real], logits[real], rtol=1e-5, atol=1e-5)  # our table is float32
    for gradient, want in zip(gradients, [embedding.grad] + [b.grad for _, b in pairs], strict=True):
        assert (gradient - want).norm() <= 1e-4 * want.norm() + 1e-6


def test_sinusoids_are_the_papers():
    table = brute_force_positions(50, 22)
    torch.testing.assert_close(sinusoids(50, 22, halves=False), table.float(), rtol=0, atol=1e-6)
    halves = torch.cat((table[:, 0::2], table[:, 1::2]), 1)
    torch.testing.assert_close(sinusoids(50, 22, halves=True), halves.float(), rtol=0, atol=1e-6)


def input_gradients(model, inputs):
    """Whether each hidden state of row 0 depends on each encoder token (U, S) and each decoder token (U, U)."""
    caught = []

    def catch(module, args, out):
        caught.append(out.detach().requires_grad_())
        return caught[-1]

    modules = [model.embed] if model.embed is model.decoder_embed else [model.embed, model.decoder_embed]
    handles = [m.register_forward_hook(catch) for m in modules]
    hidden = model(**inputs)
    for handle in handles:
        handle.remove()
    weights = torch.randn_like(hidden)
    rows = []
    for u in range(hidden.shape[1]):
        grads = torch.autograd.grad((hidden[0, u] * weights[0, u]).sum(), caught, retain_graph=True)
        rows.append([g[0].abs().sum(-1) != 0 for g in grads])
    encoder, decoder = zip(*rows, strict=True)
    return torch.stack(encoder), torch.stack(decoder)


@pytest.mark.parametrize("name", SMALL)
def test_decoder_sees_the_encoder_and_what_is_before(name):
    inputs = {"tokens": torch.randint(0, 29, (1, 5)), "decoder_tokens": torch.randint(0, 29, (1, 8))}
    encoder, decoder = input_gradients(build(name), inputs)
    assert encoder.all()
    assert torch.equal(decoder, torch.ones(8, 8, dtype=torch.bool).tril())


@pytest.mark.parametrize("name", SMALL)
def test_documents_see_their_own_numbers(name):
    documents = torch.tensor([[0, 0, 1, 2, 2, -1, -1]])  # 3 is in the decoder only, 2 in the encoder only
    decoder_documents = torch.tensor([[0, 1, 1, 1, 3, 3, -1, -1]])
    inputs = {
        "tokens": torch.randint(0, 29, (1, 7)),
        "decoder_tokens": torch.randint(0, 29, (1, 8)),
        "documents": documents,
        "decoder_documents": decoder_documents,
    }
    encoder, decoder = input_gradients(build(name), inputs)
    assert torch.equal(encoder, decoder_documents[0][:, None] == documents[0])
    same = decoder_documents[0][:, None] == decoder_documents[0]
    assert torch.equal(decoder, torch.ones(8, 8, dtype=torch.bool).tril() & same)


def test_no_softmax_is_over_nothing():
    documents = torch.tensor([[0, 0, 1], [0, -1, -1]])
    across = see_across(torch.zeros(2, 3, 4), documents, torch.tensor([[0, 1, 2, -1], [0, 0, 3, -1]]), None)
    assert across.some[..., 0].tolist() == [[True, True, False, False], [True, True, False, True]]
    assert across.seen.mask.any(-1).all()


@pytest.mark.parametrize("name", SMALL)
def test_packed_documents_are_as_alone(name):
    model = build(name)
    lengths, decoder_lengths, padding = [5, 1, 9], [2, 7, 3], 2

    def packed(lengths):
        documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
        positions = torch.cat([torch.arange(n) for n in [*lengths, padding]])
        return torch.randint(0, 29, (1, len(documents))), documents[None], positions[None]

    tokens, documents, positions = packed(lengths)
    decoder_tokens, decoder_documents, decoder_positions = packed(decoder_lengths)
    together = model(tokens, decoder_tokens, documents, positions, decoder_documents, decoder_positions)
    alone = [
        model(a, b)
        for a, b in zip(
            tokens[:, :-padding].split(lengths, 1), decoder_tokens[:, :-padding].split(decoder_lengths, 1), strict=True
        )
    ]
    torch.testing.assert_close(together[:, :-padding], torch.cat(alone, 1), **EXACT)


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(name):
    """Rows with padding on neither, either and both sides are as alone; no gradient is lost to NaN."""
    model = build(name)
    lengths, decoder_lengths = [6, 4, 6, 3], [5, 5, 2, 4]
    tokens, decoder_tokens = torch.randint(0, 29, (4, 6)), torch.randint(0, 29, (4, 5))
    documents = -(torch.arange(6) >= torch.tensor(lengths)[:, None]).long()
    decoder_documents = -(torch.arange(5) >= torch.tensor(decoder_lengths)[:, None]).long()
    alone = [
        model(tokens[i : i + 1, :n], decoder_tokens[i : i + 1, :m])[0]
        for i, (n, m) in enumerate(zip(lengths, decoder_lengths, strict=True))
    ]
    together = model(tokens, decoder_tokens, documents, decoder_documents=decoder_documents)
    assert together.isfinite().all()
    for row, want in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(want)], want, **EXACT)
    together.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():  # one side's documents alone: the other side's text is document 0
        only_encoder = model(tokens, decoder_tokens, documents)
        only_decoder = model(tokens[::2], decoder_tokens[::2], decoder_documents=decoder_documents[::2])
    for i, want in enumerate(alone):
        torch.testing.assert_close(only_encoder[i, : len(want)], want, **EXACT)
    torch.testing.assert_close(only_decoder[1, :2], alone[2], **EXACT)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_cached_pieces_are_the_whole(name, padded):
    model = build(name)
    tokens, decoder_tokens = torch.randint(0, 29, (2, 9)), torch.randint(0, 29, (2, 20))
    documents = torch.tensor([[0] * 9, [0] * 4 + [-1] * 5]) if padded else None
    decoder_documents = torch.tensor([[0] * 20, [-1] * 3 + [0] * 17]) if padded else None  # as prompts are padded
    positions = torch.stack((torch.arange(20), (torch.arange(20) - 3).clamp_min(0))) if padded else None
    cache = model.new_cache(2, 20, torch.device("cpu"), torch.float64)
    calls = []
    handles = [block.cross.kv.register_forward_hook(lambda *_: calls.append(1)) for block in model.decoder.blocks]
    with torch.no_grad():
        memory = model.encode(tokens, documents)
        pieces = []
        for columns in torch.arange(20).split((6, 1, 1, 5, 1, 1, 1, 4)):
            inside = [None if x is None else x[:, columns] for x in (decoder_documents, positions)]
            pieces.append(model.decode(decoder_tokens[:, columns], memory, documents, *inside, cache=cache))
        assert len(calls) == len(model.decoder.blocks), "the memory's keys and values are made once"
        whole = model.decode(decoder_tokens, memory, documents, decoder_documents, positions)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert cache.length == 20


@pytest.mark.parametrize("name", SMALL)
def test_token_by_token_is_the_whole(name):
    model = build(name)
    tokens, decoder_tokens = torch.randint(0, 29, (3, 5)), torch.randint(0, 29, (3, 12))
    cache = model.new_cache(3, 12, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        memory = model.encode(tokens)
        steps = [model.decode(decoder_tokens[:, i : i + 1], memory, cache=cache) for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens, decoder_tokens), **EXACT)


@pytest.mark.parametrize(("name", "millions"), [("transformer_base", 65), ("transformer_big", 213)])
def test_published_sizes(name, millions):
    # table 3 rounds, and its vocabulary is "about 37000" (section 5.1)
    model = on_meta(name, 37_000)
    d, layers = model.config.d_model, model.n_layers
    norm, attention, feed_forward = 2 * d, 4 * (d * d + d), 8 * d * d + 5 * d
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    assert count(model) == 37_000 * d + layers * (encoder + decoder)
    assert abs(count(model) / 1e6 / millions - 1) < 0.03


@pytest.mark.parametrize(("name", "released"), [("bart_base", 139_420_416), ("bart_large", 406_291_456)])
def test_bart_sizes(name, released):
    transformers = pytest.importorskip("transformers")
    c = config_of(name)
    theirs_config = transformers.BartConfig(
        vocab_size=50265,
        d_model=c.d_model,
        encoder_layers=c.n_layers,
        decoder_layers=c.decoder_layers,
        encoder_attention_heads=c.n_heads,
        decoder_attention_heads=c.n_heads,
        encoder_ffn_dim=c.ff_width,
        decoder_ffn_dim=c.ff_width,
        max_position_embeddings=1024,
    )
    with torch.device("meta"):
        theirs = transformers.BartForConditionalGeneration(theirs_config)
    unused = 2 * 2 * c.d_model  # their position tables begin with 2 rows that nothing looks up
    assert count(theirs) == released
    assert count(on_meta(name, 50265)) == released - unused


def test_marian_size():
    transformers = pytest.importorskip("transformers")
    theirs_config = transformers.MarianConfig(
        vocab_size=58101,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        theirs = transformers.MarianMTModel(theirs_config)
    learned = sum(p.numel() for p in theirs.parameters() if p.requires_grad)  # the sinusoids are frozen parameters
    assert count(on_meta("marian_base", 58101)) == learned + theirs.final_logits_bias.numel()


def test_every_config_builds():
    names = [path.stem for path in CONF.glob("*.yaml") if "TransformerConfig" in composed(path.stem)["_target_"]]
    assert {"transformer", "transformer_base", "transformer_big", "bart_base", "bart_large", "marian_base"} <= {*names}
    for name in names:
        assert on_meta(name, 1000).max_length == composed(name)["max_length"]


@pytest.mark.parametrize("tied", [True, False])
def test_flops(tied):
    config = replace(PUBLISHED, d_ff=40, n_decoder_layers=3, tied=tied, positions="learned")
    d, ff = 24, 40
    attention, feed_forward = 4 * (d * d + d), 2 * d * ff + d + ff
    encoder = attention + feed_forward + 2 * 2 * d  # the norms come with them
    decoder = 2 * attention + feed_forward + 3 * 2 * d
    pair = 6 * (2 * encoder + 3 * decoder + 29 * d) + 12 * 10 * d * (2 + 2 * 3)
    assert config.build(29).flops_per_token(10) == pair / 2


def test_init():
    torch.manual_seed(0)
    model = TransformerConfig(n_layers=2, n_heads=4, d_model=128, max_length=64, tied=False).build(500)
    block = model.decoder.blocks[1]
    for matrix in (*block.attention.qkv.weight.chunk(3), block.cross.q.weight, *block.cross.kv.weight.chunk(2)):
        limit = (6 / (128 + 128)) ** 0.5  # of each projection by itself
        assert 0.99 * limit < matrix.abs().max() <= limit
        assert abs(matrix.std() / (limit / 3**0.5) - 1) < 0.03
    limit = (6 / (128 + 512)) ** 0.5
    assert 0.99 * limit < block.mlp.expand.weight.abs().max() <= limit
    for table in (model.embed, model.decoder_embed, model.head):
        assert abs(table.weight.std() * 128**0.5 - 1) < 0.03
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    normal = replace(model.config, init_std=0.02, positions="learned").build(500)
    matrices = [p for p in normal.parameters() if p.dim() == 2]
    assert all(abs(p.std() / 0.02 - 1) < 0.05 for p in matrices)


@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_only_in_training(key):
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = replace(PUBLISHED, **(none | {key: 0.5})).build(29)
    tokens = torch.randint(0, 29, (1, 8))
    assert not torch.equal(model(tokens, tokens), model(tokens, tokens))
    model.eval()
    assert torch.equal(model(tokens, tokens), model(tokens, tokens))
    model = replace(PUBLISHED, **none).build(29)
    assert torch.equal(model(tokens, tokens), model(tokens, tokens))


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 5},
        {"n_layers": 0},
        {"n_decoder_layers": 0},
        {"d_ff": 0},
        {"dropout": 1.0},
        {"attention_dropout": -0.1},
        {"activation_dropout": 1.5},
        {"positions": "rotary"},
        {"activation": "tanh"},
        {"d_model": 27},
        {"init_std": 0.0},
        {"decoder_start_id": -1},
        {"vocab_multiple": 0},
    ],
)
def test_bad_shapes_are_refused(change):
    (key,) = change
    with pytest.raises(UserError, match=rf"model\.({key}|d_model)="):
        replace(PUBLISHED, **change)


def test_start_is_in_the_vocabulary():
    with pytest.raises(UserError, match="decoder_start_id=29"):
        replace(PUBLISHED, decoder_start_id=29).build(29)
    assert replace(PUBLISHED, decoder_start_id=28).build(29).decoder_start_id == 28


@pytest.mark.slow
@pytest.mark.parametrize("name", ["published", "bart"])
def test_compiled_in_place(name):
    plain, compiled = build(name).float(), build(name).float()
    compiled.compile()
    compiled.head.compile()
    tokens, decoder_tokens = torch.randint(0, 29, (2, 9)), torch.randint(0, 29, (2, 7))
    documents = torch.tensor([[0] * 9, [0] * 5 + [-1] * 4])
    decoder_documents = torch.tensor([[0] * 6, [0] * 4 + [-1] * 2])
    for model in (plain, compiled):
        hidden = model(tokens, decoder_tokens[:, :-1], documents, decoder_documents=decoder_documents)
        model.head.loss(hidden.flatten(0, 1), decoder_tokens[:, 1:].flatten()).backward()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    SMALL[name].build(29).load_state_dict(compiled.state_dict())


def test_copies_begin_as_what_is_looked_at():
    config = TransformerConfig(n_layers=2, n_heads=2, d_model=16, max_length=16, prenorm=True, copy_init=True)
    model = config.build(30).eval()
    cross = model.decoder.blocks[1].cross
    memory = torch.randn(1, 1, 16)
    across = Across(Visible(None, causal=False), some=None)
    torch.testing.assert_close(cross(torch.randn(1, 3, 16), memory, across, None), memory.expand(1, 3, 16))
