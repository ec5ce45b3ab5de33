"""T5: logits and gradients as Transformers', weights and files in both directions, options refused."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import to_ours, to_theirs
from lmexp.huggingface.t5 import MT5, T5
from lmexp.model.t5 import T5Config

transformers = pytest.importorskip("transformers")

V = 31
SHAPES = {
    # encoder and decoder layers, heads, width, head width, feed-forward, and options
    "v1": (2, 2, 2, 16, 8, 40, {}),
    "v1_wide": (1, 3, 4, 10, 7, 24, {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 11}),
    "v1_1": (2, 2, 3, 12, 4, 20, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "v1_1_narrow": (3, 1, 2, 20, 3, 17, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "relu_untied": (1, 1, 1, 8, 8, 8, {"tie_word_embeddings": False}),
    "gated_tied": (1, 2, 2, 8, 4, 8, {"feed_forward_proj": "gated-gelu"}),
}


def their_config(shape="v1", **change):
    encoder, decoder, heads, width, d_kv, ff, options = SHAPES[shape]
    values = {
        "vocab_size": V,
        "d_model": width,
        "d_kv": d_kv,
        "d_ff": ff,
        "num_layers": encoder,
        "num_decoder_layers": decoder,
        "num_heads": heads,
        "layer_norm_epsilon": 1e-5,
        "decoder_start_token_id": 0,
        "attn_implementation": "eager",
    }
    return transformers.T5Config(**{**values, **options, **change})


def untie(theirs):
    """A head of its own: Transformers 5 makes it the embedding, whatever the config says, until a file has both."""
    theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.shared.weight))


def randomize(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float("norm" in name), std=1.0 if "bias" in name else 0.3)
    return model.eval()


def their_model(shape):
    torch.manual_seed(3)
    theirs = transformers.T5ForConditionalGeneration(their_config(shape))
    if SHAPES[shape][-1].get("tie_word_embeddings") is False:
        untie(theirs)
    return randomize(theirs)


def built(settings, vocab_size=V):
    settings = dict(settings)
    assert settings.pop("_target_") == "lmexp.model.t5.T5Config"
    return T5Config(**settings).build(vocab_size).eval()


def load(model, architecture, state):
    """What `state` gives our model, checked to be all of it."""
    imported = to_ours(architecture, model, state)
    assert not set(imported.new) - set(imported.weights)
    assert not imported.unused
    missing = model.load_state_dict(imported.weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= ({"head.weight"} if model.config.tied else set())
    return model


def ours_from(theirs, architecture=None):
    architecture = architecture or T5()
    return load(built(architecture.settings(theirs.config.to_dict())), architecture, theirs.state_dict())


def padded_batch(source, target, left=False):
    torch.manual_seed(4)
    tokens, decoder_tokens = torch.randint(0, V, (3, source)), torch.randint(0, V, (3, target + 1))
    lengths = torch.tensor([source, max(1, source - 4), 1])[:, None]
    decoder_lengths = torch.tensor([target, max(1, target - 3), 1])[:, None]
    pad, decoder_pad = torch.arange(source) >= lengths, torch.arange(target) >= decoder_lengths
    pad = pad.flip(1) if left else pad
    return tokens, decoder_tokens[:, :-1], pad, decoder_pad, decoder_tokens[:, 1:].masked_fill(decoder_pad, -100)


def same_logits(ours, theirs, source=11, target=7, left=False):
    """Both models' logits of a batch with padding, compared."""
    tokens, decoder_tokens, pad, decoder_pad, labels = padded_batch(source, target, left)
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


@pytest.mark.parametrize(("source", "target"), [(11, 7), (1, 1), (13, 24), (41, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_theirs_as_ours(shape, source, target):
    theirs = their_model(shape)
    ours = ours_from(theirs)
    same_logits(ours, theirs, source, target)
    same_logits(ours, theirs, source, target, left=True)
    tokens, decoder_tokens = torch.randint(0, V, (2, source)), torch.randint(0, V, (2, target))
    expected = theirs(input_ids=tokens, decoder_input_ids=decoder_tokens, use_cache=False).logits
    assert (ours.head(ours(tokens, decoder_tokens)) - expected).abs().max() <= 1e-4


def test_far_apart():
    """Distances past the last bucket."""
    theirs = their_model("v1")
    same_logits(ours_from(theirs), theirs, source=301, target=211)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    theirs = their_model(shape)
    ours = ours_from(theirs)
    hidden, expected, labels = same_logits(ours, theirs)
    ours.head.loss(hidden.flatten(0, 1), labels.flatten(), n_chunks=2).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    parameters, own = dict(theirs.named_parameters(remove_duplicate=False)), dict(ours.named_parameters())
    last = {rule.ours: rule for rule in T5().rules(ours)}  # of two rules the later one counts
    assert last.keys() == own.keys()
    for name, rule in last.items():
        want = torch.cat([parameters[part].grad for part in rule.theirs])
        assert want.norm() > 0
        assert (own[name].grad - want).norm() <= 1e-4 * want.norm() + 1e-5, name


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_as_theirs_by_files(shape, tmp_path):
    """Our export, read by `from_pretrained`; what that saves, read back."""
    safetensors = pytest.importorskip("safetensors.torch")
    config = replace(T5Config(**without_target(T5().settings(their_config(shape).to_dict()))), vocab_multiple=8)
    ours = randomize(config.build(V))
    assert ours.vocab_size == 32
    exported = T5().config(ours, V)
    (tmp_path / "config.json").write_text(json.dumps(exported))
    safetensors.save_file(to_theirs(T5(), ours, V), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, loading = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.lm_head.weight is theirs.shared.weight) == ours.config.tied
    same_logits(ours, theirs.eval())

    theirs.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    state = safetensors.load_file(tmp_path / "again" / "model.safetensors")
    back = load(built(T5().settings(transformers.T5Config(**saved).to_dict())), T5(), state)
    same_logits(back, theirs)
    full = built(T5().settings({**theirs.config.to_dict(), **saved}))
    assert full.config == back.config == replace(config, vocab_multiple=1)


def without_target(settings):
    return {key: value for key, value in settings.items() if key != "_target_"}


def test_settings_of_published_files():
    """The config.json of t5-small and of t5-v1_1-small, as they have been since before Transformers 5."""
    common = {
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "layer_norm_epsilon": 1e-06,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    }
    v1 = {**common, "d_ff": 2048, "n_positions": 512, "num_heads": 8, "num_layers": 6, "model_type": "t5"}
    assert T5Config(**without_target(T5().settings(v1))) == T5Config(
        n_layers=6, n_heads=8, d_model=512, d_ff=2048, d_kv=64
    )
    v1_1 = {**common, "d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8}
    v1_1 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert T5Config(**without_target(T5().settings(v1_1))) == T5Config(
        n_layers=8, n_decoder_layers=8, n_heads=6, d_model=512, d_ff=1024, d_kv=64, gated=True, tied=False
    )


def test_a_file_without_a_head_has_the_embedding():
    """Transformers 5 ties v1.1's head too, without scaling, and leaves it out of the file."""
    torch.manual_seed(5)
    theirs = randomize(transformers.T5ForConditionalGeneration(their_config("v1_1")))
    if theirs.lm_head.weight is not theirs.shared.weight:
        pytest.skip("this version of Transformers does not tie v1.1's head")
    state = {name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    ours = load(built(T5().settings(theirs.config.to_dict())), T5(), state)
    assert torch.equal(ours.head.weight, ours.embed.weight)
    same_logits(ours, theirs)


@pytest.mark.parametrize("own_head", [True, False])
def test_mt5(own_head):
    torch.manual_seed(6)
    config = their_config("v1_1_narrow").to_dict()
    config = {k: v for k, v in config.items() if k not in ("model_type", "scale_decoder_outputs")}
    theirs = transformers.MT5ForConditionalGeneration(
        transformers.MT5Config(**{**config, "tie_word_embeddings": False, "attn_implementation": "eager"})
    )
    if own_head:
        untie(theirs)
    randomize(theirs)
    ours = ours_from(theirs, MT5())
    same_logits(ours, theirs)
    assert T5().accepts(ours)
    assert not MT5().accepts(ours)


def test_accepts_only_t5():
    assert not T5().accepts(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("architecture", [T5(), MT5()])
@pytest.mark.parametrize("change", [{"feed_forward_proj": "gated-silu"}, {"feed_forward_proj": "gelu"}])
def test_options_that_ours_lacks_are_refused(architecture, change):
    with pytest.raises(UserError, match="feed_forward_proj"):
        architecture.settings({**their_config().to_dict(), **change})


def test_the_start_is_the_padding_where_it_is_not_said():
    config = {**their_config().to_dict(), "decoder_start_token_id": None, "pad_token_id": 5}
    assert T5().settings(config)["decoder_start_id"] == 5
    with pytest.raises(UserError, match="decoder_start_token_id"):
        T5().settings({**config, "pad_token_id": None})
