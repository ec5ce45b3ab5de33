"""T5: buckets, what sees what, packing, padding, caching, counts, initial weights."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.t5 import T5 as Architecture
from lmexp.model.t5 import RelativeBias, T5Config

CONF = Path(__file__).parents[2] / "conf" / "model"

V1 = T5Config(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=24)
SMALL = {
    "v1": V1,
    "v1_1": replace(V1, n_heads=3, d_kv=4, gated=True, tied=False),
    "few_buckets": replace(V1, n_layers=1, n_decoder_layers=3, d_kv=5, n_buckets=4, max_distance=5, vocab_multiple=16),
}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
V = 29


def build(name):
    """A small model in float64 whose every weight matters."""
    torch.manual_seed(0)
    model = SMALL[name].build(V).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def composed(name):
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    base = [d for d in own.pop("defaults", []) if d != "_self_"]
    return {**(composed(base[0]) if base else {}), **own}


def config_of(name):
    values = composed(name)
    assert values.pop("_target_") == "lmexp.model.t5.T5Config"
    return T5Config(**values)


def on_meta(name, vocab_size):
    with torch.device("meta"):
        return config_of(name).build(vocab_size)


def count(model):
    return sum(p.numel() for p in model.parameters())


def random_tokens(*shape):
    return torch.randint(0, V, shape)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_contract(name):
    model, config = build(name), SMALL[name]
    memory = model.encode(random_tokens(2, 9))
    hidden = model.decode(random_tokens(2, 5), memory)
    assert memory.shape == (2, 9, config.d_model)
    assert hidden.shape == (2, 5, config.d_model)
    assert model.head(hidden).shape == (2, 5, model.vocab_size)
    assert model.vocab_size == (32 if name == "few_buckets" else V)
    assert (model.head.weight is model.embed.weight) == config.tied
    assert (model.max_length, model.n_layers, model.decoder_start_id) == (24, config.n_layers, 0)
    assert model.family == config.family == "encoder_decoder"
    assert len(model.decoder.blocks) == (3 if name == "few_buckets" else 2)


# positions -----------------------------------------------------------------------------------------------------------


def bucket_by_hand(relative, n_buckets, max_distance, both_ways):
    """The paper's rule: one bucket a distance up to half of them, then equal steps of the logarithm."""
    n = n_buckets // 2 if both_ways else n_buckets
    first = n if both_ways and relative > 0 else 0
    distance = abs(relative) if both_ways else max(0, -relative)
    half = n // 2
    if distance < half:
        return first + distance
    steps = n - half
    reached = sum(distance**steps >= half ** (steps - k) * max_distance**k for k in range(1, steps))  # exact integers
    return first + half + reached


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (4, 5), (8, 11), (6, 4), (64, 1000)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets(n_buckets, max_distance, both_ways):
    bias = RelativeBias(replace(V1, n_buckets=n_buckets, max_distance=max_distance), both_ways)
    relative = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    buckets = bias.bucket(relative)
    expected = [bucket_by_hand(r, n_buckets, max_distance, both_ways) for r in relative.tolist()]
    assert buckets.tolist() == expected
    assert buckets.min() == 0
    assert buckets.max() == n_buckets - 1


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 11), (64, 1000)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_transformers(n_buckets, max_distance, both_ways):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    bias = RelativeBias(replace(V1, n_buckets=n_buckets, max_distance=max_distance), both_ways)
    relative = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    theirs = t5.T5Attention._relative_position_bucket(relative, both_ways, n_buckets, max_distance)
    assert torch.equal(bias.bucket(relative), theirs)


@pytest.mark.parametrize(("start", "length"), [(0, 7), (0, 1), (6, 1), (4, 3)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_bias_of_columns_is_that_of_their_positions(start, length, both_ways):
    bias = RelativeBias(replace(V1, n_buckets=8, max_distance=5), both_ways)
    keys = torch.arange(start + length)[None]
    expected = bias(0, 0, keys[:, start:], keys)
    assert expected.shape == (1, 2, length, start + length)
    assert torch.equal(bias(start, length, None, None), expected)
    for i in range(length):
        for j in range(start + length):
            row = bias.table.weight[bias.bucket(torch.tensor(j - start - i))]
            assert torch.equal(expected[0, :, i, j], row)


# what sees what ------------------------------------------------------------------------------------------------------


def sizes(outputs, inputs):
    """(B, outputs' width, inputs' width): the size of the derivative of a row's t-th output by its s-th input."""
    weights, rows = torch.randn_like(outputs), []
    for t in range(outputs.shape[1]):
        (grad,) = torch.autograd.grad((outputs[:, t] * weights[:, t]).sum(), inputs, retain_graph=True)
        rows.append(grad.abs().sum(-1))
    return torch.stack(rows, 1)


def dependence(model, tokens, decoder_tokens, **options):
    """What depends on what, as booleans: memory on tokens, hidden on decoder tokens, hidden on memory."""
    caught = []

    def catch(module, arguments, output):
        output.requires_grad_()
        caught.append(output)

    handle = model.embed.register_forward_hook(catch)
    for p in model.parameters():
        p.requires_grad_(False)
    memory = model.encode(tokens, options.get("documents"), options.get("positions"))
    leaf = memory.detach().requires_grad_()
    decoder_options = {k: v for k, v in options.items() if k != "positions"}
    hidden = model.decode(decoder_tokens, leaf, **decoder_options)
    handle.remove()
    read, written = caught
    return sizes(memory, read) > 0, sizes(hidden, written) > 0, sizes(hidden, leaf) > 0


@pytest.mark.parametrize("name", SMALL)
def test_the_encoder_sees_all_and_the_decoder_no_later_token(name):
    inside, before, across = dependence(build(name), random_tokens(1, 6), random_tokens(1, 8))
    assert inside.all()
    assert torch.equal(before[0], torch.ones(8, 8, dtype=torch.bool).tril())
    assert across.all()


@pytest.mark.parametrize("name", SMALL)
def test_documents_see_only_themselves(name):
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1], [3, 3, 3, 3, 0, 0, 0, 0]])
    # the first row writes the texts in another order, and one, 5, that was not read; both rows have padding to write,
    # the second row none to read
    decoder_documents = torch.tensor([[1, 1, 0, 5, 5, 2, 2, -1, -1], [0, 3, 3, 3, 3, 3, -1, -1, -1]])
    options = {"documents": documents, "decoder_documents": decoder_documents}
    inside, before, across = dependence(build(name), random_tokens(2, 8), random_tokens(2, 9), **options)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(inside, documents[:, :, None] == documents[:, None])
    assert torch.equal(before, (decoder_documents[:, :, None] == decoder_documents[:, None]) & causal)
    assert torch.equal(across, decoder_documents[:, :, None] == documents[:, None])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("given", ["documents", "decoder_documents"])
def test_a_side_without_documents_is_document_0(name, given):
    model, tokens, decoder_tokens = build(name), random_tokens(2, 4), random_tokens(2, 4)
    documents = torch.tensor([[0, 0, 0, -1], [0, -1, -1, -1]])
    other = "decoder_documents" if given == "documents" else "documents"
    part = model(tokens, decoder_tokens, **{given: documents})
    whole = model(tokens, decoder_tokens, **{given: documents, other: torch.zeros_like(documents)})
    own = documents == 0 if given == "decoder_documents" else torch.ones_like(documents) == 1
    torch.testing.assert_close(part[own], whole[own], **EXACT)


# packing and padding -------------------------------------------------------------------------------------------------


def pack(lengths):
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return documents, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_packed_texts_are_as_alone(name, with_positions):
    model, lengths, decoder_lengths = build(name), [5, 1, 9, 4], [2, 7, 1, 3]
    documents, positions = pack(lengths)
    decoder_documents, decoder_positions = pack(decoder_lengths)
    tokens, decoder_tokens = random_tokens(1, 19), random_tokens(1, 13)
    options = {"positions": positions, "decoder_positions": decoder_positions} if with_positions else {}
    packed = model(tokens, decoder_tokens, documents=documents, decoder_documents=decoder_documents, **options)
    pairs = zip(tokens.split(lengths, 1), decoder_tokens.split(decoder_lengths, 1), strict=True)
    torch.testing.assert_close(packed, torch.cat([model(*pair) for pair in pairs], 1), **EXACT)


@pytest.mark.parametrize("name", SMALL)
def test_positions_are_what_counts(name):
    """Two texts whose tokens take turns: columns would give other distances."""
    model, tokens, decoder_tokens = build(name), random_tokens(1, 10), random_tokens(1, 8)
    options = {
        "documents": torch.arange(10)[None] % 2,
        "positions": torch.arange(10)[None] // 2,
        "decoder_documents": torch.arange(8)[None] % 2,
        "decoder_positions": torch.arange(8)[None] // 2,
    }
    mixed = model(tokens, decoder_tokens, **options)
    for i in range(2):
        alone = model(tokens[:, i::2], decoder_tokens[:, i::2])
        torch.testing.assert_close(mixed[:, i::2], alone, **EXACT)
    assert not torch.allclose(
        mixed, model(tokens, decoder_tokens, options["documents"], None, options["documents"][:, :8])
    )


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(name):
    """More columns of it, in any rows, on either side; the loss's gradients too, and nothing is NaN."""
    model, tokens, decoder_tokens = build(name), random_tokens(2, 6), random_tokens(2, 5)

    def results(extra, decoder_extra):
        documents, decoder_documents = (
            torch.cat((torch.zeros(2, n, dtype=torch.long), torch.full((2, m), -1)), 1)
            for n, m in ((6, extra), (5, decoder_extra))
        )
        model.zero_grad()
        hidden = model(
            torch.cat((tokens, random_tokens(2, extra)), 1),
            torch.cat((decoder_tokens, random_tokens(2, decoder_extra)), 1),
            documents=documents,
            decoder_documents=decoder_documents,
        )
        assert hidden.isfinite().all()
        labels = torch.full((2, 5 + decoder_extra), -100)
        labels[:, :5] = 1
        model.head.loss(hidden.flatten(0, 1), labels.flatten()).backward()
        return hidden[:, :5].detach(), [p.grad.clone() for p in model.parameters()]

    expected, expected_grads = results(0, 0)
    for extra, decoder_extra in ((3, 0), (0, 4), (2, 3)):
        hidden, grads = results(extra, decoder_extra)
        torch.testing.assert_close(hidden, expected, **EXACT)
        torch.testing.assert_close(grads, expected_grads, **EXACT)


# caching -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "padded", "positions"])
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 1, 4, 1)])
@pytest.mark.parametrize("name", SMALL)
def test_cached_pieces_are_the_whole(name, pieces, options):
    model, tokens, decoder_tokens = build(name), random_tokens(2, 7), random_tokens(2, 12)
    documents, own = None, {}
    if options != "plain":
        documents = torch.zeros(2, 7, dtype=torch.long)
        documents[1, 3:] = -1
        own["decoder_documents"] = torch.zeros(2, 12, dtype=torch.long)
    if options == "positions":
        own["decoder_positions"] = torch.stack((torch.arange(12), 3 * torch.arange(12)))
    calls = []
    for block in model.decoder.blocks:
        block.cross.kv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        memory = model.encode(tokens, documents)
        whole = model.decode(decoder_tokens, memory, documents, **own)
        calls.clear()
        cache, parts, start = model.new_cache(2, 12, torch.device("cpu"), torch.float64), [], 0
        for n in pieces:
            now = {key: value[:, start : start + n] for key, value in own.items()}
            parts.append(model.decode(decoder_tokens[:, start : start + n], memory, documents, **now, cache=cache))
            start += n
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    assert cache.length == 12
    assert len(calls) == len(model.decoder.blocks), "the memory's keys and values are computed once"


# counts, initial weights, options ------------------------------------------------------------------------------------

PUBLISHED = {
    # name: (parameters, as they are rounded in section 3.7, and for v1.1 where the checkpoints are listed)
    "t5_small": (60_506_624, 60e6),
    "t5_base": (222_903_552, 220e6),
    "t5_large": (737_668_096, 770e6),
    "t5_3b": (2_851_598_336, 2.8e9),
    "t5_11b": (11_307_321_344, 11e9),
    "t5_v1_1_small": (76_961_152, 77e6),
    "t5_v1_1_base": (247_577_856, 250e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    expected, rounded = PUBLISHED[name]
    model = on_meta(name, 32128)
    assert count(model) == expected
    assert f"{expected:,}" in (CONF / f"{name}.yaml").read_text().splitlines()[0]
    assert abs(expected / rounded - 1) < 0.05


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_transformers(name):
    transformers = pytest.importorskip("transformers")
    model = on_meta(name, 32128)
    their_config = transformers.T5Config(**Architecture().config(model, 32128))
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(their_config)
    parameters = {id(p): p.numel() for p in theirs.parameters()}
    if not model.config.tied:  # Transformers 5 makes the head the embedding until a file has both
        parameters[id(theirs.shared.weight)] = theirs.shared.weight.numel()
        parameters["head"] = theirs.lm_head.weight.numel()
        if theirs.lm_head.weight is not theirs.shared.weight:
            del parameters[id(theirs.lm_head.weight)]
    assert sum(parameters.values()) == count(model)


def test_every_config_builds():
    names = [path.stem for path in CONF.glob("t5*.yaml")]
    assert set(names) == {"t5", *PUBLISHED}
    for name in names:
        assert on_meta(name, 1000).max_length == composed(name)["max_length"]


@pytest.mark.parametrize("options", [{}, {"gated": True, "tied": False, "n_decoder_layers": 2}])
def test_initial_weights_are_transformers(options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = T5Config(n_layers=1, n_heads=8, d_model=128, d_kv=24, d_ff=320, n_buckets=512, max_distance=999, **options)
    ours = config.build(1000)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**Architecture().config(ours, 1000)))
    own, parameters = dict(ours.named_parameters()), dict(theirs.named_parameters(remove_duplicate=False))
    last = {rule.ours: rule for rule in Architecture().rules(ours)}
    assert last.keys() == own.keys()
    for name, rule in last.items():
        if name == "head.weight":
            continue
        for part, expected in zip(own[name].chunk(len(rule.theirs)), rule.theirs, strict=True):
            expected = parameters[expected]
            if expected.dim() == 1:
                assert torch.equal(part, expected)
                continue
            assert abs(part.mean()) < 4 * expected.std() / math.sqrt(part.numel())
            assert abs(part.std() / expected.std() - 1) < 0.06, name


@pytest.mark.parametrize("tied", [True, False])
def test_first_logits_have_deviation_1(tied):
    torch.manual_seed(1)
    model = T5Config(n_layers=1, n_heads=4, d_model=64, d_ff=128, tied=tied).build(2000).eval()
    with torch.no_grad():
        logits = model.head(model(*torch.randint(0, 2000, (2, 64, 16))))
    assert abs(logits.std() - 1) < 0.1


def test_flops():
    config = T5Config(n_layers=2, n_decoder_layers=3, n_heads=2, d_model=16, d_kv=6, d_ff=24)
    attention, mlp, norm = 4 * 16 * 12, 2 * 16 * 24, 16
    encoder = 2 * (attention + mlp + 2 * norm) + norm
    decoder = 3 * (2 * attention + mlp + 3 * norm) + norm
    scores = 12 * 10 * 12 * (2 + 3 + 3)  # 10 positions, heads 12 wide; encoder's, decoder's and cross-attentions
    expected = (6 * (encoder + decoder + V * 16) + scores) / 2
    assert config.build(V).flops_per_token(10) == expected
    assert replace(config, tied=False).build(V).flops_per_token(10) == expected


def test_dropout_only_in_training():
    model = replace(V1, dropout=0.5).build(V)
    tokens, decoder_tokens = random_tokens(1, 8), random_tokens(1, 8)
    assert not torch.equal(model(tokens, decoder_tokens), model(tokens, decoder_tokens))
    model.eval()
    assert torch.equal(model(tokens, decoder_tokens), model(tokens, decoder_tokens))


@pytest.mark.parametrize("name", SMALL)
def test_in_half_precision(name):
    model = build(name).float()
    tokens, decoder_tokens = random_tokens(2, 6), random_tokens(2, 5)
    documents = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, -1, -1]])
    options = {"documents": documents, "decoder_documents": torch.tensor([[0, 0, 0, -1, -1], [0, 0, 1, 1, 1]])}
    expected = model(tokens, decoder_tokens, **options)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens, decoder_tokens, **options)
        model.head.loss(hidden.flatten(0, 1), decoder_tokens.flatten()).backward()
    assert (hidden - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 3},
        {"n_layers": 0},
        {"n_decoder_layers": 0},
        {"d_kv": 0},
        {"d_ff": 0},
        {"max_length": 0},
        {"norm_eps": 0.0},
        {"dropout": 1.0},
        {"n_buckets": 2},
        {"n_buckets": 9},
        {"max_distance": 16},
        {"decoder_start_id": -1},
        {"vocab_multiple": 0},
    ],
)
def test_bad_shapes_are_refused(change):
    with pytest.raises(UserError, match="model"):
        replace(V1, **change)


def test_a_start_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model\.decoder_start_id=29"):
        replace(V1, decoder_start_id=V).build(V)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v1_1"])
def test_compiled_in_place(name):
    plain, compiled = build(name).float(), build(name).float()
    compiled.compile()
    compiled.head.compile()
    tokens, decoder_tokens = random_tokens(2, 9), random_tokens(2, 8)
    documents = torch.tensor([[0] * 9, [0] * 4 + [1] * 3 + [-1] * 2])
    for model in (plain, compiled):
        hidden = model(tokens, decoder_tokens, documents=documents, decoder_documents=documents[:, :8])
        model.head.loss(hidden.flatten(0, 1), decoder_tokens.flatten()).backward()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
