"""GPT-2 both ways; and what is the same for all architectures: the registry, reading files, writing folders."""

import json

import pytest
import torch
import torch.nn.functional as F

from lmexp.contracts import UserError
from lmexp.huggingface.architecture import Architecture, to_ours, to_theirs
from lmexp.huggingface.convert import ARCHITECTURES, architecture, architecture_of, read
from lmexp.huggingface.export import backend_of, write
from lmexp.huggingface.files import complete, find
from lmexp.model.bert import BertConfig
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.llama import LlamaConfig
from lmexp.model.t5 import T5Config
from lmexp.model.transformer import TransformerConfig
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import ByteTokenizer
from lmexp.tokenizer.char import CharTokenizer
from lmexp.tokenizer.pretrained import Pretrained
from lmexp.tokenizer.tokenizer import EOS
from lmexp.tokenizer.wordpiece import WordPiece

transformers = pytest.importorskip("transformers")
V = 31

TEXTS = [
    "the model reads a line, and writes another\n\none of it  twice; naïve Übergröße 東京\U0001f469\u200d\U0001f680\t!",
    "",
    " ",
    "don't\r\n  stop",
]


def their_model(heads=3, width=24, **options):
    config = transformers.GPT2Config(
        vocab_size=V,
        n_layer=2,
        n_head=heads,
        n_embd=width,
        n_positions=24,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        **options,
    )
    return randomized(transformers.GPT2LMHeadModel(config))


def randomized(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


def ours_from(config, state, **options):
    found = architecture("gpt2")
    settings = found.settings(config)
    assert settings.pop("_target_") == "lmexp.model.gpt.GPTConfig"
    model = GPTConfig(**settings, **options).build(V).eval()
    imported = to_ours(found, model, state)
    assert not imported.new
    assert not imported.unused
    model.load_state_dict(imported.weights, strict=False)
    return found, model


@pytest.mark.parametrize(("heads", "width", "length"), [(3, 24, 11), (1, 10, 24), (5, 40, 1)])
def test_theirs_as_ours(heads, width, length):
    theirs = their_model(heads, width)
    found, ours = ours_from(theirs.config.to_dict(), theirs.state_dict(), vocab_multiple=16)
    assert ours.vocab_size == 32
    tokens = torch.randint(0, V, (2, length + 1))
    hidden = ours(tokens[:, :-1])
    expected = theirs(tokens[:, :-1]).logits
    assert (ours.head(hidden)[..., :V] - expected).abs().max() <= 1e-4
    rows = ours.head(hidden)[..., :V].flatten(0, 1)
    F.cross_entropy(rows, tokens[:, 1:].flatten(), reduction="sum").backward()
    F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters(remove_duplicate=False))
    for rule in found.rules(ours):
        (name,) = rule.theirs
        want = other[name].grad.T if rule.transpose else other[name].grad
        assert (own[rule.ours].grad[: want.shape[0]] - want).norm() <= 1e-4 * want.norm() + 1e-5
    state, back = theirs.state_dict(), to_theirs(found, ours, V)
    assert state.keys() == back.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_files_of_the_base_model():
    theirs = their_model()
    state = dict(theirs.transformer.state_dict())
    state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()  # old files hold the causal mask
    model = GPTConfig(n_layers=2, n_heads=3, d_model=24, max_length=24).build(V)
    found = architecture("gpt2")
    imported = to_ours(found, model, state)
    assert not imported.new
    assert imported.unused == ["h.0.attn.bias"]
    assert imported.unused[0].endswith(found.computed)
    assert torch.equal(imported.weights["embed.weight"], theirs.transformer.wte.weight)


def test_rows_that_are_no_tokens_are_left_out():
    theirs = their_model()
    model = GPTConfig(n_layers=2, n_heads=3, d_model=24, max_length=24, vocab_multiple=4).build(21)
    weights = to_ours(architecture("gpt2"), model, theirs.state_dict(), vocab_size=21).weights
    assert torch.equal(weights["embed.weight"][:21], theirs.transformer.wte.weight[:21])
    assert not weights["embed.weight"][21:].any()
    with pytest.raises(UserError, match=r"\(31, 24\).*\(24, 24\)"):
        to_ours(architecture("gpt2"), model, theirs.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"n_inner": 10},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"layer_norm_epsilon": 1e-3},
    ],
)
def test_what_ours_lacks_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        architecture("gpt2").settings({**their_model().config.to_dict(), **change})


def test_what_theirs_lack_is_refused():
    model = GPTConfig(n_layers=1, n_heads=2, d_model=8, max_length=8, bias=False).build(V)
    with pytest.raises(UserError, match=r"model\.bias=false"):
        architecture("gpt2").config(model, V)
    with pytest.raises(UserError, match="no architecture like this Fast"):
        architecture_of(FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=8).build(V))


# --- the registry


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_loads(model_type):
    found = architecture(model_type)
    assert isinstance(found, Architecture)
    assert found.model_type == model_type
    if model_type in transformers.CONFIG_MAPPING:  # an old version has not all
        config = complete({"model_type": model_type, "sliding_window": None})
        assert found.settings(config)["_target_"].startswith("lmexp.model.")


def test_unknown_architectures_are_refused():
    with pytest.raises(UserError, match=r"model_type=gpt_neox.*model=auto"):
        architecture("gpt_neox")


# --- files


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin_shards"])
def test_every_form_of_weights_is_read(form, tmp_path):
    theirs = their_model()
    if form.startswith("bin"):
        theirs.config.save_pretrained(tmp_path)
        state = dict(theirs.state_dict())
        if form == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            names = sorted(state)
            parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            for part, inside in parts.items():
                torch.save({name: state[name] for name in inside}, tmp_path / part)
            index = {"weight_map": {name: part for part, inside in parts.items() for name in inside}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="10GB" if form == "safetensors" else "20KB")
        assert (tmp_path / "model.safetensors.index.json").is_file() == (form == "shards")
    config, state, tokenizer = read(str(tmp_path), tmp_path / "cache")
    assert tokenizer is None
    _, ours = ours_from(config, state)
    tokens = torch.randint(0, V, (1, 9))
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4


def test_a_config_without_defaults_is_completed(tmp_path):
    short = {"model_type": "gpt2", "n_layer": 2, "vocab_size": V}
    (tmp_path / "config.json").write_text(json.dumps(short))
    config = find(str(tmp_path), tmp_path).config
    assert config["n_embd"] == 768
    assert config["activation_function"] == "gelu_new"


def damaged(folder, what):
    their_model().save_pretrained(folder, max_shard_size="20KB" if "shard" in what else "10GB")
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "cut off":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "a missing shard":
        sorted(folder.glob("model-*.safetensors"))[0].unlink()
    elif what == "a shard elsewhere":
        path = folder / "model.safetensors.index.json"
        path.write_text(path.read_text().replace("model-00001", "../model-00001"))
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "broken config":
        (folder / "config.json").write_text("{")
    elif what == "no model type":
        (folder / "config.json").write_text("{}")
    elif what == "unknown model type":
        (folder / "config.json").write_text('{"model_type": "no_such_thing"}')
    elif what == "a pickled object":
        (folder / "model.safetensors").unlink()
        torch.save({"x": Danger()}, folder / "pytorch_model.bin")


class Danger:
    pass


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no weights", "holds no weights"),
        ("cut off", "cannot be read"),
        ("a missing shard", "not beside it"),
        ("a shard elsewhere", "not beside it"),
        ("no config", "holds no config.json"),
        ("broken config", "cannot be read as JSON"),
        ("no model type", "no model_type"),
        ("unknown model type", "no_such_thing"),
        ("a pickled object", "cannot be read"),
    ],
)
def test_damaged_folders_are_told(what, words, tmp_path):
    damaged(tmp_path, what)
    with pytest.raises(UserError, match=words):
        read(str(tmp_path), tmp_path / "cache")


def test_names_that_are_nothing(tmp_path, monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(UserError, match=r"gpt2-tiny is no folder here.*no route to host.*without a network"):
        find("someone/gpt2-tiny", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find("/no/such/folder/here", tmp_path)
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    with pytest.raises(UserError, match="expected a Hugging Face folder"):
        find(str(other), tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, or not")
    with pytest.raises(UserError, match=r"broken\.gguf"):
        find(str(broken), tmp_path)


def test_hub_names_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    their_model().save_pretrained(tmp_path)
    asked = []

    def download(name, **kwargs):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = find("someone/gpt2-tiny", tmp_path)
    assert asked == ["someone/gpt2-tiny"]
    assert source.config["n_embd"] == 24


def write_gguf(path, n_layers=2, width=64, heads=4, kv_heads=2, inner=96):
    """A small Llama as llama.cpp keeps it, at half precision; returns the number of its tokens."""
    gguf = pytest.importorskip("gguf")
    saved = json.loads(BPE(290).train(iter(TEXTS * 20)).to_json())["tokenizers"]
    vocabulary = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(48)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-4)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))  # the document end is a control token
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(vocabulary), width), "output": (len(vocabulary), width)}
    for layer in range(n_layers):
        kv = kv_heads * width // heads
        block = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
        block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    shapes["output_norm"] = (width,)
    torch.manual_seed(4)
    for name, shape in shapes.items():
        values = torch.randn(shape) * 0.2
        half = len(shape) > 1
        writer.add_tensor(f"{name}.weight", (values.half() if half else values).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(vocabulary)


def test_a_gguf_file(tmp_path):
    path = tmp_path / "small.gguf"
    vocab_size = write_gguf(path)
    config, state, folder = read(str(path), tmp_path / "cache")
    found = architecture(config["model_type"])
    settings = found.settings(config)
    del settings["_target_"]
    assert settings["rope_theta"] == 5000.0
    ours = LlamaConfig(**settings).build(vocab_size).eval()
    ours.load_state_dict(to_ours(found, ours, state).weights, strict=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    read_by = transformers.AutoTokenizer.from_pretrained(folder)
    ids = read_by(TEXTS[0], return_tensors="pt", add_special_tokens=False).input_ids[:, :40]
    expected = theirs(ids).logits
    assert expected.std() > 0.1, "a test of nothing"
    assert (ours.head(ours(ids)) - expected).abs().max() <= 1e-4
    own = Pretrained(str(folder)).train(iter(()))
    assert own.vocab_size == vocab_size
    assert own.encode([TEXTS[0]])[0].tolist()[:40] == ids[0].tolist()
    assert own.eos_id == 0
    assert find(str(path), tmp_path / "cache").tokenizer == folder, "made once"


# --- folders

MODELS = {
    "gpt2": GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=32, vocab_multiple=16),
    "llama": LlamaConfig(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=32, vocab_multiple=16),
    "llama_tied": LlamaConfig(n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=24, max_length=32, tied=True),
    "qwen2": LlamaConfig(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=32, qkv_bias=True),
    "qwen3": LlamaConfig(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=32, qk_norm=True, tied=True),
    "bert": BertConfig(n_layers=2, n_heads=2, d_model=16, max_length=32, vocab_multiple=16),
    "t5": T5Config(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=32),
    "t5_v1_1": T5Config(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=32, tied=False, gated=True),
    "bart": TransformerConfig(
        n_layers=2, n_heads=2, d_model=16, max_length=32, positions="learned", embedding_norm=True, activation="gelu"
    ),
    "marian": TransformerConfig(n_layers=2, n_heads=2, d_model=16, max_length=32, positions="sinusoidal_halves"),
}
AUTO = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}


def trained(kind):
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer("".join(TEXTS))
    config = BPE(300) if kind == "bpe" else WordPiece(200)
    return config.train(iter(TEXTS * 20))


@pytest.mark.parametrize("name", MODELS)
def test_exported_folders_load(name, tmp_path):
    tokenizer = trained("bpe").with_roles(("mask", "cls", "sep") if name == "bert" else ())
    ours = randomized(MODELS[name].build(tokenizer.vocab_size))
    class_name = write(tmp_path, ours, tokenizer)
    if json.loads((tmp_path / "config.json").read_text())["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of Transformers has no such model")
    auto = getattr(transformers, AUTO[ours.family])
    theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == class_name
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = theirs.eval()
    read_by = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXTS[0][:40]
    encoded = read_by(text, return_tensors="pt").input_ids
    assert encoded[0].tolist() == tokenizer.encode([text])[0].tolist()
    assert read_by.eos_token_id == tokenizer.eos_id
    assert len(read_by) == tokenizer.vocab_size
    if name == "bert":
        assert read_by.mask_token_id == tokenizer.roles["mask"]
    tokens = encoded[:, :20]
    inputs = (tokens, tokens[:, :7]) if ours.family == "encoder_decoder" else (tokens,)
    more = {"decoder_input_ids": tokens[:, :7]} if ours.family == "encoder_decoder" else {}
    logits = ours.head(ours(*inputs))[..., : tokenizer.vocab_size]
    assert (theirs(input_ids=tokens, **more).logits - logits).abs().max() <= 1e-4

    config, state, folder = read(str(tmp_path), tmp_path / "cache")
    assert folder == tmp_path
    found = architecture(config["model_type"])
    imported = to_ours(found, ours, state)
    assert not imported.new
    own = ours.state_dict()
    for key, value in imported.weights.items():
        assert torch.equal(value[: tokenizer.vocab_size], own[key][: tokenizer.vocab_size]), key
    if ours.family == "decoder":
        generated = theirs.generate(tokens[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated.shape[1] <= 7


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "wordpiece"])
def test_exported_tokenizers_are_the_same(kind, tmp_path):
    tokenizer = trained(kind).with_roles(("mask",))
    write(tmp_path, MODELS["llama"].build(tokenizer.vocab_size), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "unseen: ß∂ƒ", "\x00\x1f"] if kind != "char" else [*TEXTS, "unseen: ß∂ƒ"]
    for text, own in zip(texts, tokenizer.encode(texts), strict=True):
        assert theirs(text).input_ids == own.tolist(), repr(text)
        if kind != "wordpiece":
            assert theirs.decode(own.tolist()) == tokenizer.decode(own)
    assert theirs.convert_tokens_to_ids(EOS if kind != "wordpiece" else theirs.eos_token) == tokenizer.eos_id
    assert theirs.mask_token_id == tokenizer.roles["mask"]
    assert backend_of(tokenizer).get_vocab_size(with_added_tokens=True) == tokenizer.vocab_size


def test_weights_are_written_as_they_are_stored(tmp_path):
    tokenizer = ByteTokenizer()
    write(tmp_path, MODELS["gpt2"].build(tokenizer.vocab_size), tokenizer, torch.bfloat16)
    _, state, _ = read(str(tmp_path), tmp_path)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert theirs.dtype == torch.bfloat16
