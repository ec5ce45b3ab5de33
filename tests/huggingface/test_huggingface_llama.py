"""Llama, Mistral, Qwen2 and Qwen3: what Transformers makes of ours and ours of theirs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import to_ours, to_theirs
from lmexp.huggingface.convert import architecture, architecture_of
from lmexp.huggingface.files import complete
from lmexp.model.llama import LlamaConfig

transformers = pytest.importorskip("transformers")
V = 31
SCALING = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    # kind, heads, key-value heads, head width, and options
    "plain": ("llama", 4, 4, 6, {}),
    "grouped": ("llama", 6, 2, 4, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "one_group": ("llama", 3, 1, 10, {"rope_theta": 77.0}),
    "scaled": ("llama", 2, 1, 12, {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **SCALING}}),
    "mistral": ("mistral", 4, 2, 6, {"sliding_window": None}),
    "qwen2": ("qwen2", 4, 2, 6, {"rope_theta": 1e6}),
    "qwen2_tied": ("qwen2", 3, 3, 8, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", 4, 2, 10, {"rope_theta": 1e6}),
    "qwen3_tied": ("qwen3", 6, 1, 4, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
}


def their_config(shape, **change):
    kind, heads, kv_heads, d_head, options = SHAPES[shape]
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {kind}")
    values = {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "max_position_embeddings": 40,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return transformers.AutoConfig.for_model(kind, **{**values, **options, **change})


def randomized(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def their_model(shape):
    return randomized(
        transformers.AutoModelForCausalLM.from_config(their_config(shape), attn_implementation="eager").float()
    )


def ours_from(theirs, vocab_multiple=1):
    found = architecture(theirs.config.model_type)
    settings = found.settings(theirs.config.to_dict())
    assert settings.pop("_target_") == "lmexp.model.llama.LlamaConfig"
    model = LlamaConfig(**settings, vocab_multiple=vocab_multiple).build(V).eval()
    imported = to_ours(found, model, theirs.state_dict())
    assert not imported.new
    assert not imported.unused
    model.load_state_dict(imported.weights, strict=False)
    covered = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in imported.weights}
    assert covered == {id(p) for p in model.parameters()}
    return found, model


@pytest.mark.parametrize("length", [1, 13, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_theirs_as_ours(shape, length):
    theirs = their_model(shape)
    _, ours = ours_from(theirs, vocab_multiple=16)
    assert ours.vocab_size == 32
    tokens = torch.randint(0, V, (2, length))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1, "a test of nothing"
    assert (ours.head(ours(tokens))[..., :V] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    theirs = their_model(shape)
    found, ours = ours_from(theirs)
    tokens = torch.randint(0, V, (2, 12))
    hidden = ours(tokens[:, :-1])
    ours.head.loss(hidden.flatten(0, 1), tokens[:, 1:].flatten(), n_chunks=3).backward()
    logits = theirs(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters(remove_duplicate=False))
    compared = set()
    for rule in found.rules(ours):
        want = torch.cat([other[name].grad for name in rule.theirs])
        assert (own[rule.ours].grad - want).norm() <= 1e-4 * want.norm() + 1e-5, rule.ours
        compared.add(rule.ours)
    assert compared == set(own)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape):
    theirs = their_model(shape)
    found, ours = ours_from(theirs, vocab_multiple=16)
    state, back = theirs.state_dict(), to_theirs(found, ours, V)
    assert state.keys() == back.keys()
    for name, value in back.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "mistral"])
def test_ours_as_theirs(shape, tmp_path):
    """The config.json that ours write is what theirs were made of, as both versions of Transformers spell it."""
    theirs = their_model(shape)
    found, ours = ours_from(theirs)
    assert type(architecture_of(ours)) is type(found)
    config = found.config(ours, V)
    kind, architectures = config["model_type"], config["architectures"]
    again = transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    assert architectures == [type(theirs).__name__]
    assert found.settings(again.to_dict()) == found.settings(theirs.config.to_dict())
    assert found.settings(complete(config)) == found.settings(config)
    model = transformers.AutoModelForCausalLM.from_config(again)
    report = model.load_state_dict(to_theirs(found, ours, V))
    assert not report.missing_keys
    assert not report.unexpected_keys
    tokens = torch.randint(0, V, (1, 20))
    assert (model.eval()(tokens).logits - ours.head(ours(tokens))).abs().max() <= 1e-4


def test_old_and_new_spelling_of_rotary_settings():
    old = {"rope_theta": 5000.0, "rope_scaling": {"type": "llama3", **SCALING}}
    new = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "llama3", **SCALING}}
    base = {k: v for k, v in their_config("plain").to_dict().items() if not k.startswith("rope")}
    found = architecture("llama")
    one, two = found.settings({**base, **old}), found.settings({**base, **new})
    assert one == two
    assert one["rope_theta"] == 5000.0
    assert one["rope_scaling"] == SCALING
    bare = found.settings({**base, "rope_theta": 3.0, "rope_scaling": None})
    assert (bare["rope_theta"], bare["rope_scaling"]) == (3.0, None)


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ("plain", {"attention_bias": True}),
        ("plain", {"mlp_bias": True}),
        ("plain", {"hidden_act": "gelu"}),
        ("plain", {"attention_dropout": 0.1}),
        ("qwen3", {"attention_bias": True}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True}),
        ("plain", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("plain", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
)
def test_what_ours_lacks_is_refused(shape, change):
    config = {**their_config(shape).to_dict(), **change}
    key = next(iter(change)) if "rope_parameters" not in change else "rope_type=linear|partial_rotary_factor=0.5"
    with pytest.raises(UserError, match=key):
        architecture(config["model_type"]).settings(config)


def test_what_theirs_lack_is_refused():
    config = LlamaConfig(n_layers=1, n_heads=2, d_model=8, d_ff=8, max_length=8, qkv_bias=True, qk_norm=True)
    with pytest.raises(UserError, match="no architecture like this Llama"):
        architecture_of(config.build(V))


def test_groups_of_another_shape_are_refused():
    """Projections that are as many rows together, but not one by one, must not be taken for one another."""
    theirs = their_model("one_group")
    found = architecture("llama")
    settings = found.settings(theirs.config.to_dict())
    del settings["_target_"]
    ours = replace(LlamaConfig(**settings), d_head=2, n_heads=23, n_kv_heads=1).build(V)
    with pytest.raises(UserError, match="30 \\+ 10 \\+ 10 rows; expected 46 \\+ 2 \\+ 2"):
        to_ours(found, ours, theirs.state_dict())


@pytest.mark.parametrize(
    "scaling",
    [{"factor": 2.0}, {**SCALING, "factor": 0.0}, {**SCALING, "low_freq_factor": 5.0}],
)
def test_bad_scaling_is_refused(scaling):
    with pytest.raises(UserError, match="rope_scaling"):
        LlamaConfig(n_layers=1, n_heads=2, d_model=8, d_ff=8, max_length=8, rope_scaling=scaling)


def test_cached_steps_are_the_whole():
    """Norms of queries and keys, biases and stretched positions, with a cache as without."""
    torch.manual_seed(5)
    config = LlamaConfig(
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_model=16,
        d_ff=8,
        max_length=40,
        qkv_bias=True,
        qk_norm=True,
        rope_scaling=SCALING,
    )
    model = randomized(config.build(V))
    tokens = torch.randint(0, V, (2, 9))
    cache = model.new_cache(2, 9, torch.device("cpu"), torch.float32)
    steps = [model(tokens[:, :4], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(4, 9))]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("qwen2_0p5b", 494_032_768), ("qwen3_0p6b", 596_049_920)])
def test_published_sizes(name, expected):
    from tests.model.test_model_families import on_meta

    assert sum(p.numel() for p in on_meta(name, 151936).parameters()) == expected
