"""BERT, RoBERTa and XLM-R: logits and gradients as Transformers', weights in both directions, options refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import to_ours, to_theirs
from lmexp.huggingface.bert import BERT
from lmexp.huggingface.roberta import RoBERTa, XLMRoBERTa
from lmexp.model.bert import BertConfig
from lmexp.model.gpt import GPTConfig

transformers = pytest.importorskip("transformers")

ARCHITECTURES = {"bert": BERT(), "roberta": RoBERTa(), "xlm-roberta": XLMRoBERTa()}
NAMES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
V, PAD = 31, 1

SHAPES = {
    # layers, heads, width, feed-forward, segments and options
    "plain": (2, 2, 16, 64, 2, {}),
    "odd": (3, 3, 15, 37, 1, {"layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.3}),
    "one": (1, 1, 10, 8, 4, {"attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}),
}
CASES = [(kind, shape) for kind in NAMES for shape in SHAPES]


def their_class(kind, name):
    return getattr(transformers, f"{NAMES[kind]}{name}")


def their_config(kind, shape="plain", **change):
    layers, heads, width, ff, segments, options = SHAPES[shape]
    values = {
        "vocab_size": V,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ff,
        "type_vocab_size": segments,
        "max_position_embeddings": 24 if kind == "bert" else 26,
        "pad_token_id": PAD,
        "attn_implementation": "eager",
    }
    return their_class(kind, "Config")(**{**values, **options, **change})


@torch.no_grad()
def randomize(model):
    """Weights that all matter; norms about 1, so that attention has something to choose."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            p.normal_(1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0, 0.3)
    return model


def their_model(kind, shape):
    torch.manual_seed(3)
    return randomize(their_class(kind, "ForMaskedLM")(their_config(kind, shape))).eval()


def ours_from(kind, theirs, **change):
    settings = ARCHITECTURES[kind].settings(theirs.config.to_dict())
    assert settings.pop("_target_") == "lmexp.model.bert.BertConfig"
    model = BertConfig(**{**settings, **change}).build(theirs.config.vocab_size).eval()
    imported = to_ours(ARCHITECTURES[kind], model, theirs.state_dict())
    assert not imported.new
    assert not imported.unused
    report = model.load_state_dict(imported.weights, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"head.weight"}  # the embedding's
    return model


def padded_batch(config, length):
    """Tokens (no padding but at the ends), which are padding, segments, labels."""
    torch.manual_seed(4)
    tokens = torch.randint(2, V, (3, length))
    pad = torch.arange(length) >= torch.tensor([length, max(1, length - 4), 1])[:, None]
    segments = torch.randint(0, config.n_segments, (3, length))
    labels = torch.randint(0, V, (3, length)).masked_fill(pad | (torch.rand(3, length) < 0.5), -100)
    labels[:, 0] = torch.randint(0, V, (3,))
    return tokens.masked_fill(pad, PAD), pad, segments, labels


def same_logits(ours, theirs, length=11):
    """Both models' logits of a batch with padding and segments, compared."""
    tokens, pad, segments, labels = padded_batch(ours.config, length)
    hidden = ours(tokens, -pad.long(), segments=segments)
    expected = theirs(tokens, attention_mask=(~pad).long(), token_type_ids=segments).logits
    assert expected[~pad].std() > 0.1, "a test of nothing"
    assert (ours.head(hidden)[..., :V] - expected)[~pad].abs().max() <= 1e-4
    return hidden, expected, labels


@pytest.mark.parametrize("length", [11, 1, 24, 8])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_theirs_as_ours(kind, shape, length):
    theirs = their_model(kind, shape)
    ours = ours_from(kind, theirs)
    assert ours.max_length == 24
    same_logits(ours, theirs, length)
    tokens = torch.randint(2, V, (2, length))
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_packed_texts_are_theirs_alone(kind, shape):
    theirs = their_model(kind, shape)
    ours = ours_from(kind, theirs)
    lengths = [5, 1, 9]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = torch.randint(2, V, documents.shape)
    alone = torch.cat([theirs(text).logits for text in tokens.split(lengths, 1)], 1)
    assert (ours.head(ours(tokens, documents, positions)) - alone).abs().max() <= 1e-4


@pytest.mark.parametrize("n_chunks", [1, 3])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_gradients(kind, shape, n_chunks):
    theirs = their_model(kind, shape)
    ours = ours_from(kind, theirs)
    hidden, expected, labels = same_logits(ours, theirs)
    scored = labels != -100  # the head is asked for these only
    ours.head.loss(hidden[scored], labels[scored], n_chunks=n_chunks).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    parameters, own = dict(theirs.named_parameters(remove_duplicate=False)), dict(ours.named_parameters())
    compared = set()
    for rule in ARCHITECTURES[kind].rules(ours):
        want = torch.cat([parameters[name].grad for name in rule.theirs])[rule.offset :]
        assert (own[rule.ours].grad - want).norm() <= 1e-4 * want.norm() + 1e-5, rule.ours
        compared.add(rule.ours)
    assert compared == set(own)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_there_and_back(kind, shape, tmp_path):
    """A file that `save_pretrained` wrote (without copies) gives ours, padded or not; ours give the same file."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    architecture, theirs = ARCHITECTURES[kind], their_model(kind, shape)
    ours = ours_from(kind, theirs)
    theirs.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    imported = to_ours(architecture, ours, file)
    assert not set(imported.new) - set(imported.weights)
    assert not imported.unused
    for name, value in imported.weights.items():
        assert torch.equal(value, ours.state_dict()[name]), name
    state = theirs.state_dict()
    padded = ours_from(kind, theirs, vocab_multiple=16)
    assert padded.vocab_size == 32
    same_logits(padded, theirs)
    for model in (ours, padded):
        back = to_theirs(architecture, model, V)
        assert set(file) <= set(back) == set(state)
        for name, value in back.items():
            assert value.shape == state[name].shape, name
            unused = 2 if kind != "bert" and "position" in name else 0  # rows that nothing looks up
            assert torch.equal(value[unused:], state[name][unused:]), name


@pytest.mark.parametrize("kind", NAMES)
def test_a_base_model_has_no_head(kind):
    """Files of base models lack the prefix and the head, and have a pooler."""
    torch.manual_seed(6)
    theirs = randomize(their_class(kind, "Model")(their_config(kind))).eval()
    settings = ARCHITECTURES[kind].settings(theirs.config.to_dict())
    settings.pop("_target_")
    ours = BertConfig(**settings).build(V).eval()
    imported = to_ours(ARCHITECTURES[kind], ours, theirs.state_dict())
    head = {f"head.transform.{name}.{kind}" for name in ("dense", "norm") for kind in ("weight", "bias")}
    assert set(imported.new) - set(imported.weights) == {"head.bias", *head}
    assert set(imported.unused) == {"pooler.dense.weight", "pooler.dense.bias"}
    optional = {rule.ours for rule in ARCHITECTURES[kind].rules(ours) if rule.optional}
    assert set(imported.new) <= optional
    ours.load_state_dict(imported.weights, strict=False)
    tokens, pad, segments, _ = padded_batch(ours.config, 11)
    expected = theirs(tokens, attention_mask=(~pad).long(), token_type_ids=segments).last_hidden_state
    assert (ours(tokens, -pad.long(), segments=segments) - expected)[~pad].abs().max() <= 1e-4


PUBLISHED = BertConfig(n_layers=2, n_heads=3, d_model=18, max_length=24, d_ff=20, init_std=0.1, vocab_multiple=16)
OURS = {
    "bert": PUBLISHED,
    "bert_more": replace(PUBLISHED, n_layers=1, d_ff=None, n_segments=3, dropout=0.0, attention_dropout=0.2),
    "roberta": replace(PUBLISHED, n_segments=1, norm_eps=1e-5),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_as_theirs(name, tmp_path):
    torch.manual_seed(5)
    save_file = pytest.importorskip("safetensors.torch").save_file
    kind = name.split("_")[0]
    architecture = ARCHITECTURES[kind]
    ours = randomize(OURS[name].build(V)).eval()
    assert ours.vocab_size == 32
    assert [other for other in ARCHITECTURES.values() if other.accepts(ours)] == [architecture]
    values = architecture.config(ours, V)
    assert values.pop("architectures") == [f"{NAMES[kind]}ForMaskedLM"]
    assert values.pop("model_type") == kind
    their_class(kind, "Config")(**values).save_pretrained(tmp_path)
    save_file(to_theirs(architecture, ours, V), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = their_class(kind, "ForMaskedLM").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[f"{what}_keys"] for what in ("mismatched", "unexpected", "missing"))
    same_logits(ours, theirs.eval())

    settings = architecture.settings(theirs.config.to_dict())
    settings.pop("_target_")
    assert BertConfig(**settings) == replace(ours.config, d_ff=ours.config.ff_width, vocab_multiple=1)


def test_a_decoder_is_not_accepted():
    model = GPTConfig(n_layers=1, n_heads=1, d_model=8, max_length=8).build(V)
    assert not any(architecture.accepts(model) for architecture in ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("bert", "hidden_act", "relu"),
        ("roberta", "hidden_act", "gelu_new"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "tie_word_embeddings", False),
        ("xlm-roberta", "is_decoder", True),
        ("roberta", "add_cross_attention", True),
        ("roberta", "pad_token_id", 0),
        ("xlm-roberta", "pad_token_id", None),
    ],
)
def test_what_ours_lacks_is_refused(kind, key, value):
    with pytest.raises(UserError, match=f"{key}={value}; expected"):
        ARCHITECTURES[kind].settings({**their_config(kind).to_dict(), key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prenorm": True}, "prenorm=true.*train with model.prenorm=false"),
        ({"rope": True}, "rope=true"),
        ({"gated": True}, "gated=true"),
        ({"bias": False}, "bias=false.*train with model.bias=true"),
        ({"head_transform": False}, "head_transform=false"),
        ({"n_languages": 2}, "n_languages=2.*has 0 only"),
        ({"n_segments": 0}, "n_segments=0.*n_segments=2"),
    ],
)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_what_theirs_lack_is_refused(name, change, message):
    model = replace(OURS[name], **change).build(V)
    (architecture,) = (other for other in ARCHITECTURES.values() if other.accepts(model))
    with pytest.raises(UserError, match=message):
        architecture.config(model, V)
