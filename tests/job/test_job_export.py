"""job=export and init_from=: from a run to a folder of Hugging Face's, and back into a model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.huggingface import export as writer
from lmexp.huggingface.architecture import Imported
from lmexp.job.build import build_node
from lmexp.job.export import export
from lmexp.job.initialize import Origin, check_fit, find, initialize
from lmexp.job.restore import restore
from lmexp.job.train import train
from lmexp.tokenizer.tokenizer import Tokenizer
from tests.runs import TINY, corpus, plan, run

transformers = pytest.importorskip("transformers")
TEXT = "the model reads a line"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of GPT-2 on bytes (`gpt`) and one of a Llama on subwords (`llama`), exported both."""
    folder = tmp_path_factory.mktemp("export")
    common = [corpus(folder), f"paths.cache_dir={folder / 'cache'}", "max_steps=2", "validate_every=2"]
    runs = {
        "gpt": [*TINY, "model=gpt", "callback.average.decay=0.5"],
        "llama": [*TINY, "model=llama", "model.d_ff=24", "tokenizer=bpe", "tokenizer.vocab_size=270"],
    }
    for name, overrides in runs.items():
        train(plan(*overrides, *common, f"paths.run_dir={folder / name}"))
        export(plan("job=export", f"ckpt={folder / name}", "format=hf", f"out={folder / f'{name}-hf'}"))
    (folder / "corpus.txt").rename(folder / "moved.txt")  # an export needs no data
    export(plan("job=export", f"ckpt={folder / 'gpt'}", f"out={folder / 'again'}"))
    (folder / "moved.txt").rename(folder / "corpus.txt")
    return folder


def model_and_tokenizer(place: Path, name: str):
    restored = restore(plan("job=generate", f"ckpt={place / name}", "trainer=cpu"), 1)
    return restored.task.model.eval(), restored.tokenizer


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_the_folder_is_the_run(place: Path, name: str) -> None:
    ours, tokenizer = model_and_tokenizer(place, name)
    out = place / f"{name}-hf"
    assert {p.name for p in out.iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    assert not list(place.glob(".*.tmp"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = transformers.AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt").input_ids[:, :16]
    assert ids[0].tolist() == tokenizer.encode([TEXT])[0].tolist()[:16]
    assert (theirs(ids).logits - ours.head(ours(ids))).abs().max() <= 1e-4


def fitting(place: Path, name: str, *more: str):
    """Overrides that agree with a source made of the run `name`."""
    base = [*TINY, corpus(place), f"paths.cache_dir={place / 'cache'}"]
    own = {"gpt": ["model=gpt"], "llama": ["model=llama", "model.d_ff=24", "tokenizer=bpe", "tokenizer.vocab_size=270"]}
    return plan(*base, *own[name], *more).config


def from_source(place: Path, source: str, cfg, tokenizer: Tokenizer) -> tuple[torch.nn.Module, Imported, list[str]]:
    origin = find(source, place / "cache")
    check_fit(origin, cfg)
    torch.manual_seed(7)
    model = build_node(cfg, "model").build(tokenizer.vocab_size)
    said: list[str] = []
    return model.eval(), initialize(model, origin, tokenizer, said.append), said


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("source", ["{}", "{}/checkpoints/best.ckpt", "{}-hf"])
def test_every_source_gives_the_same_logits(place: Path, name: str, source: str) -> None:
    trained, tokenizer = model_and_tokenizer(place, name)
    model, imported, said = from_source(
        place, str(place / source.format(name)), fitting(place, name, "model.vocab_multiple=8"), tokenizer
    )
    assert not imported.new
    assert not imported.unused
    assert "Initial weights" in said[0]
    ids = torch.randint(0, tokenizer.vocab_size, (2, 11))
    logits = model.head(model(ids))[..., : tokenizer.vocab_size]
    assert torch.equal(logits, trained.head(trained(ids)))


@pytest.mark.parametrize("source", ["llama", "llama-hf"])
def test_training_begins_where_the_source_ended(place: Path, source: str) -> None:
    """A step of length 0 leaves the weights as they are, so the loss is that of the source."""
    out = place / f"from-{source}"
    overrides = [*TINY, "model=llama", "model.d_ff=24", "tokenizer=bpe", "tokenizer.vocab_size=270", corpus(place)]
    overrides += [f"paths.cache_dir={place / 'cache'}", "max_steps=1", "optimizer=adamw", "optimizer.lr=0"]
    train(plan(*overrides, f"init_from={place / source}", f"paths.run_dir={out}"))
    metrics = [json.loads((folder / "metrics.json").read_text())["val/loss"] for folder in (out, place / "llama")]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert "Initial weights: 15 tensors" in " ".join((out / "run.log").read_text().split())
    with pytest.raises(UserError, match=r"Set: model\.n_layers=2"):
        train(plan(*overrides, "model.n_layers=3", f"init_from={place / source}", f"paths.run_dir={place / 'no'}"))
    assert not (place / "no").exists()


@pytest.mark.parametrize("source", ["gpt", "gpt-hf"])
def test_new_tokens_come_after_the_old_ones(place: Path, source: str) -> None:
    trained, tokenizer = model_and_tokenizer(place, "gpt")
    longer = tokenizer.with_roles(("mask", "sentinel_0"))
    model, _, said = from_source(place, str(place / source), fitting(place, "gpt"), longer)
    assert "2 new tokens" in said[0]
    assert torch.equal(model.embed.weight[:257], trained.embed.weight)
    mean = trained.embed.weight.mean(0)
    torch.testing.assert_close(model.embed.weight[257:], mean.expand(2, -1), rtol=1e-5, atol=1e-6)


def test_files_whose_vocabulary_is_padded(place: Path) -> None:
    """More rows than tokens, as Qwen's have: the rows of no token are left out."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "llama-hf")
    tokenizer = model_and_tokenizer(place, "llama")[1]
    theirs.resize_token_embeddings(tokenizer.vocab_size + 10)
    wide = place / "wide"
    theirs.save_pretrained(wide)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (wide / file).write_bytes((place / "llama-hf" / file).read_bytes())
    model, _, _ = from_source(place, str(wide), fitting(place, "llama"), tokenizer)
    assert model.vocab_size == tokenizer.vocab_size
    ids = torch.randint(0, tokenizer.vocab_size, (1, 9))
    expected = theirs.eval()(ids).logits[..., : tokenizer.vocab_size]
    assert (model.head(model(ids)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("source", "name", "overrides", "words"),
    [
        ("gpt-hf", "gpt", ["model.n_layers=3"], ["model.n_layers=3, in the source 2", "Set: model.n_layers=2"]),
        ("gpt", "gpt", ["model.n_layers=3", "model.bias=false"], ["n_layers", "Set: model.n_layers=2 model.bias=true"]),
        ("gpt-hf", "llama", [], ["model=gpt model.n_layers=2", "model.max_length=1024"]),
        ("llama", "gpt", [], ["model=llama", "model.d_ff=24", "model.rope_scaling=null"]),
        ("llama-hf", "llama", ["model.qk_norm=true", "model.n_kv_heads=1"], ["model.n_kv_heads=2 model.qk_norm=false"]),
        ("gpt-hf", "gpt", ["tokenizer=pretrained", "tokenizer.path={}/llama-hf"], ["ids mean other text", "gpt-hf"]),
        ("llama-hf", "llama", ["tokenizer=byte", "~tokenizer.vocab_size"], ["tokenizer=pretrained tokenizer.path="]),
        ("gpt-hf", "gpt", ["model=auto", "model.name=gpt2"], ["model.pretrained=true", "leave init_from out"]),
    ],
)
def test_misfits_name_the_overrides_that_mend_them(
    place: Path, source: str, name: str, overrides: list[str], words: list[str]
) -> None:
    if "model=auto" in overrides:
        cfg = plan("data=files", corpus(place), *overrides).config
    elif "tokenizer=byte" in overrides:
        cfg = plan(*TINY, corpus(place), "model=llama", "model.d_ff=24").config
    else:
        cfg = fitting(place, name, *(o.format(place) for o in overrides))
    with pytest.raises(UserError) as caught:
        check_fit(find(str(place / source), place / "cache"), cfg)
    for word in words:
        assert word in str(caught.value)


def test_what_may_differ(place: Path) -> None:
    check_fit(find(str(place / "gpt-hf"), place), fitting(place, "gpt", "model.dropout=0.1", "model.vocab_multiple=64"))
    llama = fitting(place, "llama", "model.max_length=64", "model.n_kv_heads=2")
    check_fit(find(str(place / "llama-hf"), place), llama)


def test_the_tokenizer_of_a_run_is_at_hand(place: Path) -> None:
    """A run whose tokenizer was trained on other text: the error names a file with the right one, which then fits."""
    origin = find(str(place / "llama"), place / "cache")
    other = model_and_tokenizer(place, "gpt")[1]
    model = build_node(fitting(place, "llama"), "model").build(other.vocab_size)
    with pytest.raises(UserError, match=r"tokenizer=pretrained tokenizer\.path=") as caught:
        initialize(model, origin, other)
    path = str(caught.value).rpartition("tokenizer.path=")[2]
    loaded = build_node(plan("data=files", "tokenizer=pretrained", f"tokenizer.path={path}").config, "tokenizer")
    assert loaded.train(iter(())).to_json() == origin.tokenizer.to_json()


def test_sources_that_are_not_whole(place: Path) -> None:
    origin = find(str(place / "gpt-hf"), place)
    model, tokenizer = model_and_tokenizer(place, "gpt")
    state = origin.state()
    del state["transformer.h.1.mlp.c_fc.weight"]
    with pytest.raises(UserError, match=r"lacks blocks\.1\.mlp\.expand\.weight"):
        initialize(model, replace(origin, state=lambda: state), tokenizer)
    with pytest.raises(UserError, match=r"257 rows in its vocabulary and no tokenizer\.json"):
        initialize(model, replace(origin, tokenizer=None), tokenizer.with_roles(("mask",)))
    strange = replace(origin, state=lambda: {**origin.state(), "score.weight": torch.zeros(2, 16)})
    assert initialize(model, strange, tokenizer).unused == ["score.weight"]


def test_find_without_a_tokenizer(place: Path) -> None:
    bare = place / "bare"
    transformers.AutoModelForCausalLM.from_pretrained(place / "gpt-hf").save_pretrained(bare)
    origin = find(str(bare), place)
    assert isinstance(origin, Origin)
    assert origin.tokenizer is None
    model, tokenizer = model_and_tokenizer(place, "gpt")
    assert not initialize(model, origin, tokenizer).new


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["out={}/new"], "needs a checkpoint"),
        (["ckpt={}/gpt"], "needs a folder"),
        (["ckpt={}/gpt", "out={}/gpt"], "a folder with files in it"),
        (["ckpt={}/gpt", "out={}/corpus.txt"], "is a file"),
        (["ckpt={}/gpt", "out={}/new", "format=onnx"], "format=onnx; expected hf or checkpoint"),
        (["ckpt={}/gpt", "out={}/gpt", "format=checkpoint"], "is there already"),
        (["ckpt={}/gpt", "format=checkpoint"], "needs a file to write"),
        (["ckpt={}/gpt", "out={}/new", "model=gpt"], "the checkpoint decides this"),
        (["ckpt={}/nothing", "out={}/new"], "does not exist"),
    ],
)
def test_exports_that_are_refused(place: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        export(plan("job=export", *(override.format(place) for override in overrides)))
    assert not (place / "new").exists()
    assert not list(place.glob(".*.tmp"))


def test_nothing_half_made_is_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_tokenizer", full)
    with pytest.raises(UserError, match="is full"):
        export(plan("job=export", f"ckpt={place / 'gpt'}", f"out={place / 'new'}"))
    assert not (place / "new").exists()
    assert not list(place.glob(".*.tmp"))


def test_models_that_have_no_form_of_theirs(tmp_path: Path) -> None:
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", "max_steps=1"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'fast'}"))
    with pytest.raises(UserError, match="no architecture like this Fast"):
        export(plan("job=export", f"ckpt={tmp_path / 'fast'}", f"out={tmp_path / 'new'}"))
    assert not (tmp_path / "new").exists()


def test_auto_is_trained_measured_and_exported(tmp_path: Path) -> None:
    small = "{hidden_size:16,num_hidden_layers:2,num_attention_heads:2,intermediate_size:24}"
    args = [o for o in TINY if not o.startswith("model.")]
    args += ["model=auto", "model.name=gpt_neox", f"model.overrides={small}", corpus(tmp_path)]
    args += [f"paths.cache_dir={tmp_path / 'cache'}", "max_steps=2", "validate_every=2", "optimizer=adamw"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'run'}"))
    ours, tokenizer = model_and_tokenizer(tmp_path, "run")
    out = tmp_path / "hf"
    export(plan("job=export", f"ckpt={tmp_path / 'run'}", f"out={out}"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = transformers.AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode([TEXT])[0].tolist()
    assert torch.equal(theirs(ids).logits, ours(ids))


@pytest.mark.slow
def test_from_the_command_line(place: Path) -> None:
    out = place / "told"
    done = run("job=export", f"ckpt={place / 'gpt'}", "format=hf", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "GPT2LMHeadModel" in done.stdout
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 257
    again = run("job=export", f"ckpt={place / 'gpt'}", "format=hf", f"out={out}")
    assert again.returncode == 2
    assert "a folder with files in it" in again.stderr
