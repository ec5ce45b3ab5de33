"""BART and Marian: logits and gradients as Transformers', weights in both directions, options refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import to_ours, to_theirs
from lmexp.huggingface.bart import Bart
from lmexp.huggingface.marian import Marian
from lmexp.model.transformer import TransformerConfig

transformers = pytest.importorskip("transformers")

ARCHITECTURES = {"bart": Bart(), "marian": Marian()}
CLASSES = {
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    "marian": (transformers.MarianConfig, transformers.MarianMTModel),
}
V = 31

SHAPES = {
    # encoder and decoder layers, heads, width, feed-forward, and options
    "plain": (2, 2, 2, 16, 64, {}),
    "deep_encoder": (3, 1, 3, 18, 37, {"activation_function": "gelu", "scale_embedding": True}),
    "deep_decoder": (1, 3, 1, 10, 24, {"activation_function": "swish", "scale_embedding": True}),
    "untied": (1, 2, 5, 20, 8, {"activation_function": "relu", "tie_word_embeddings": False}),
}
CASES = [(kind, shape) for kind in ARCHITECTURES for shape in SHAPES]


def their_config(kind, shape="plain", **change):
    encoder, decoder, heads, width, ff, options = SHAPES[shape]
    values = {
        "vocab_size": V,
        "d_model": width,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": ff,
        "decoder_ffn_dim": ff,
        "max_position_embeddings": 24,
        "pad_token_id": V - 1,
        "decoder_start_token_id": V - 1,
        "forced_eos_token_id": None,
        "attn_implementation": "eager",
    }
    return CLASSES[kind][0](**{**values, **options, **change})


def randomize(model):
    """Every number matters, those of buffers too, but the sinusoids stay what they are."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def their_model(kind, shape):
    torch.manual_seed(3)
    return randomize(CLASSES[kind][1](their_config(kind, shape))).eval()


def ours_from(architecture, theirs):
    settings = architecture.settings(theirs.config.to_dict())
    assert settings.pop("_target_") == "lmexp.model.transformer.TransformerConfig"
    model = TransformerConfig(**settings).build(theirs.config.vocab_size).eval()
    imported = to_ours(architecture, model, theirs.state_dict())
    assert not set(imported.new) - set(imported.weights)
    assert all(name.endswith(architecture.computed) for name in imported.unused)
    tables = [name for name in theirs.state_dict() if "embed_positions" in name]
    assert imported.unused == (sorted(tables) if architecture.model_type == "marian" else [])
    missing = model.load_state_dict(imported.weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"decoder_embed.weight", "head.weight"}
    assert model.config.tied or not missing.missing_keys
    return model


def padded_batch(source, target):
    torch.manual_seed(4)
    tokens, decoder_tokens = torch.randint(0, V, (3, source)), torch.randint(0, V, (3, target + 1))
    lengths = torch.tensor([source, max(1, source - 4), 1])[:, None]
    decoder_lengths = torch.tensor([target, max(1, target - 3), 1])[:, None]
    pad, decoder_pad = torch.arange(source) >= lengths, torch.arange(target) >= decoder_lengths
    labels = decoder_tokens[:, 1:].masked_fill(decoder_pad, -100)
    return tokens, decoder_tokens[:, :-1], pad, decoder_pad, labels


def same_logits(ours, theirs, source=11, target=7):
    """Both models' logits of a batch with padding, compared."""
    tokens, decoder_tokens, pad, decoder_pad, labels = padded_batch(source, target)
    hidden = ours(tokens, decoder_tokens, -pad.long(), decoder_documents=-decoder_pad.long())
    expected = theirs(
        input_ids=tokens,
        attention_mask=(~pad).long(),
        decoder_input_ids=decoder_tokens,
        decoder_attention_mask=(~decoder_pad).long(),
        use_cache=False,
    ).logits
    logits = ours.head(hidden)[..., :V]
    assert expected[~decoder_pad].std() > 0.1, "a test of nothing"
    assert (logits - expected)[~decoder_pad].abs().max() <= 1e-4
    return hidden, expected, labels


@pytest.mark.parametrize(("source", "target"), [(11, 7), (1, 1), (13, 24), (24, 5)])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_theirs_as_ours(kind, shape, source, target):
    theirs = their_model(kind, shape)
    ours = ours_from(ARCHITECTURES[kind], theirs)
    same_logits(ours, theirs, source, target)
    tokens, decoder_tokens = torch.randint(0, V, (2, source)), torch.randint(0, V, (2, target))
    expected = theirs(input_ids=tokens, decoder_input_ids=decoder_tokens, use_cache=False).logits
    assert (ours.head(ours(tokens, decoder_tokens)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_gradients(kind, shape):
    theirs = their_model(kind, shape)
    ours = ours_from(ARCHITECTURES[kind], theirs)
    hidden, expected, labels = same_logits(ours, theirs)
    ours.head.loss(hidden.flatten(0, 1), labels.flatten(), n_chunks=2).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    parameters, own = dict(theirs.named_parameters(remove_duplicate=False)), dict(ours.named_parameters())
    tables = [name for name in parameters if "embed_tokens" in name or "shared" in name]
    compared = set()
    for rule in ARCHITECTURES[kind].rules(ours):
        if rule.theirs[0] not in parameters or parameters[rule.theirs[0]].grad is None:
            continue  # their bias is a buffer; an untied `shared` is idle
        want = torch.cat([parameters[name].grad for name in rule.theirs])[rule.offset :]
        if rule.theirs[0] in tables:  # theirs gives padding tokens no gradient, unless it comes from the head
            keep = torch.arange(V) != theirs.config.pad_token_id
            gradient, want = own[rule.ours].grad[keep], want[keep]
        else:
            gradient = own[rule.ours].grad
        assert (gradient - want).norm() <= 1e-4 * want.norm() + 1e-5, rule.ours
        compared.add(rule.ours)
    assert compared == set(own) - {"head.bias"}


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_there_and_back(kind, shape, tmp_path):
    """What `save_pretrained` wrote (without copies) gives ours; ours give back each of their numbers."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    architecture, theirs = ARCHITECTURES[kind], their_model(kind, shape)
    ours = ours_from(architecture, theirs)
    theirs.save_pretrained(tmp_path)
    imported = to_ours(architecture, ours, load_file(tmp_path / "model.safetensors"))
    assert not set(imported.new) - set(imported.weights)
    assert not imported.unused
    for name, value in imported.weights.items():
        assert torch.equal(value, ours.state_dict()[name]), name
    back = to_theirs(architecture, ours, V)
    state = theirs.state_dict()
    assert set(state) - set(back) == {name for name in state if kind == "marian" and "embed_positions" in name}
    for name, value in back.items():
        if name == "model.shared.weight" and shape == "untied":
            continue  # idle; ours is a copy of the encoder's
        offset = 2 if "embed_positions" in name else 0
        assert value.shape == state[name].shape, name
        assert torch.equal(value[offset:], state[name][offset:]), name


OURS = {
    "bart": TransformerConfig(
        n_layers=2,
        n_heads=2,
        d_model=16,
        max_length=24,
        n_decoder_layers=1,
        positions="learned",
        embedding_norm=True,
        scale_embedding=False,
        activation="gelu",
        decoder_start_id=2,
        init_std=0.1,
        vocab_multiple=16,
    ),
    "marian": TransformerConfig(
        n_layers=1,
        n_heads=4,
        d_model=16,
        max_length=24,
        n_decoder_layers=2,
        d_ff=24,
        positions="sinusoidal_halves",
        activation="swish",
        decoder_start_id=3,
        vocab_multiple=16,
    ),
}


@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", OURS)
def test_ours_as_theirs(kind, tied, head_bias, tmp_path):
    torch.manual_seed(5)
    save_file = pytest.importorskip("safetensors.torch").save_file
    architecture = ARCHITECTURES[kind]
    ours = randomize(replace(OURS[kind], tied=tied, head_bias=head_bias).build(V)).eval()
    assert ours.vocab_size == 32
    assert architecture.accepts(ours)
    assert not any(other.accepts(ours) for other in ARCHITECTURES.values() if other is not architecture)
    values = architecture.config(ours, V)
    assert values.pop("architectures") == [CLASSES[kind][1].__name__]
    assert values.pop("model_type") == kind
    CLASSES[kind][0](**values).save_pretrained(tmp_path)
    save_file(to_theirs(architecture, ours, V), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = CLASSES[kind][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    same_logits(ours, theirs.eval())

    settings = architecture.settings(theirs.config.to_dict())
    settings.pop("_target_")
    same = replace(ours.config, n_decoder_layers=ours.config.decoder_layers, d_ff=ours.config.ff_width, head_bias=True)
    same = replace(same, init_std=ours.config.init_std or 0.02, vocab_multiple=1)
    assert TransformerConfig(**settings) == same


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        ("bart", {"decoder_attention_heads": 4}, "decoder_attention_heads=4"),
        ("bart", {"decoder_ffn_dim": 8}, "decoder_ffn_dim=8"),
        ("bart", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ("marian", {"decoder_layerdrop": 0.2}, "decoder_layerdrop=0.2"),
        ("marian", {"activation_function": "tanh"}, "activation_function=tanh"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=false"),
        ("marian", {"decoder_vocab_size": 40}, "decoder_vocab_size=40"),
        ("bart", {"decoder_start_token_id": None}, "decoder_start_token_id"),
    ],
)
def test_what_ours_lacks_is_refused(kind, change, key):
    config = {**their_config(kind).to_dict(), **change}
    with pytest.raises(UserError, match=key):
        ARCHITECTURES[kind].settings(config)


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        ("bart", {"prenorm": True}, "prenorm=true"),
        ("bart", {"embedding_norm": False}, "embedding_norm=false"),
        ("marian", {"positions": "sinusoidal"}, "positions=sinusoidal: .*train with model.positions=sinusoidal_halves"),
        ("marian", {"prenorm": True}, "prenorm=true"),
        ("marian", {"embedding_norm": True}, "embedding_norm=true"),
    ],
)
def test_what_theirs_lack_is_refused(kind, change, key):
    model = replace(OURS[kind], **change).build(V)
    assert ARCHITECTURES[kind].accepts(model)
    with pytest.raises(UserError, match=key):
        ARCHITECTURES[kind].config(model, V)
