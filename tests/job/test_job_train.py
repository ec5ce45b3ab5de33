"""What a run leaves: files, curves, texts, HPARAMS; and that training trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lmexp.job.check import check
from lmexp.job.evaluate import evaluate
from lmexp.job.generate import generate
from lmexp.job.launch import run_here
from lmexp.job.train import train
from lmexp.run import checkpoint as files
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.tokenizer import Tokenizer
from tests.job.test_job_objectives import data as paired_files
from tests.runs import ROOT, TINY, checkpoint, corpus, pages, plan, run, scalars

NEED_A_TEXT = ("shakespeare_char",)
PAPERS = {
    "gpt2": [],
    "bert_base": [],
    "cramming": ["model.d_ff=96", "trainer.micro_batch_size=null"],
    "t5_small": ["model.d_ff=128", "model.d_kv=null"],
    "xlm": ["objective.language_embeddings=false"],
}
"""Recipes at their real size, on data of the hub -> what makes them small."""
LABELS = ("sentiment", "sentiment_sst2", "finetune_hf_sentiment")
"""Recipes that tell labels."""
PAIRS = {
    "summarize": [],
    "summarize_cnn": ["objective.max_target=null", "model.activation_dropout=0", "decoding.min_new_tokens=0"],
    "translate_iwslt": ["data.batch_tokens=null"],
    "translate_multi30k": [],
    "finetune_lora": ["task.lora=null", "model.n_kv_heads=2", "objective.max_source=null"],
}
"""Recipes from text to text -> what makes them small."""
PRETRAINED = ("gpt2", "finetune_hf_sentiment", "summarize_cnn", "finetune_lora")
"""Recipes with a tokenizer of the hub's."""
EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on a small text."""
    folder = tmp_path_factory.mktemp("finished")
    out = folder / "run"
    args = [*TINY, corpus(folder), f"paths.cache_dir={folder / 'cache'}", f"paths.run_dir={out}"]
    train(plan(*args, "max_steps=12", "validate_every=5", "log_every=4", "callback.average.decay=0.5"))
    return out


def test_the_files_of_a_finished_run(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["steps"] == 12
    assert metrics["tokens"] == 12 * 8 * 16
    assert metrics["seconds"] > 0
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    for tag in ("train/loss", "val/loss", "val/bits_per_byte", "speed/tokens_per_second", "speed/mfu", "optim/lr"):
        assert tag in metrics
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["max_steps"] == 12
    environment = json.loads((finished / "environment.json").read_text())
    for key in ("commit", "packages", "cpu", "data_fingerprint", "tokenizer_fingerprint", "command"):
        assert key in environment
    assert "Results" in (finished / "run.log").read_text()
    left = {p.name.split(".")[0] if p.name.startswith("events") else p.name for p in finished.iterdir()}
    projector = {"00012", "projector_config.pbtxt"}
    written = {"config.yaml", "environment.json", "tokenizer.json", "metrics.json", "run.log"}
    assert left == {"checkpoints", "events", ".lock"} | written | projector


def test_checkpoints_are_plain_and_kept_as_asked(finished: Path) -> None:
    content = checkpoint(finished)
    assert content["lmexp"]["step"] == 12
    assert all(isinstance(value, torch.Tensor) for value in content["state_dict"].values())
    assert not any("_orig_mod" in key for key in content["state_dict"])
    assert Tokenizer.from_json(content["lmexp"]["tokenizer"]).vocab_size == 257
    best = checkpoint(finished, "best.ckpt")["lmexp"]["best"]
    assert best["step"] == content["lmexp"]["best"]["step"]
    kept = files.saved_steps(finished / "checkpoints")
    assert kept == sorted({10, 12, best["step"]})


def test_the_curves(finished: Path) -> None:
    curves = scalars(finished)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in curves["optim/grad_norm"]] == list(range(1, 13))
    assert [step for step, _ in curves["val/loss"]] == [5, 10, 12]
    windows = [step for step, _ in curves["speed/tokens_per_second"]]
    assert windows == [4, 5, 8, 10, 12]  # every four steps, and where it was saved
    for tag in ("val/perplexity", "val/bits_per_byte", "train/perplexity", "train/bits_per_byte", "optim/lr"):
        assert tag in curves
    for tag in ("speed/mfu", "speed/step_ms", "speed/data_wait", "speed/tokens", "memory/gib", "optim/lr_matrices"):
        assert len(curves[tag]) == len(windows)
    assert curves["speed/tokens"][-1][1] == 12 * 8 * 16
    loss = dict(curves["train/loss"])
    window = sum(loss[s] for s in range(1, 5)) / 4
    import math

    assert dict(curves["train/perplexity"])[4] == pytest.approx(math.exp(window), rel=1e-5)


def test_texts_and_hparams(finished: Path) -> None:
    found, records = pages(finished)
    texts = {tag: [step for step, _ in of] for tag, of in found.items() if isinstance(of[0][1], str)}
    assert texts == {"config": [0], "data": [0], "model": [0], "samples/0": [5, 10, 12]}
    experiment = next(r.experiment for r in records if r.HasField("experiment"))
    assert "val/loss" in {info.name.tag for info in experiment.metric_infos}
    started = next(r.session_start_info for r in records if r.HasField("session_start_info"))
    assert started.hparams["optimizer"].string_value == "muon"
    assert started.hparams["model.n_layers"].string_value == "2"  # it was set on the command line
    assert sum(r.HasField("session_end_info") for r in records) == 1


def test_update_ratio_against_its_definition(tmp_path: Path) -> None:
    """||w' - w|| / ||w|| of the step at which it is measured, from the checkpoints before and after it."""
    out = tmp_path / "run"
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={out}", "max_steps=5"]
    more = ["callback.checkpoint.every_steps=1", "callback.checkpoint.keep=9", "callback.tracking.update_ratio_every=4"]
    train(plan(*args, *more, "log_every=1", "validate_every=5"))
    three, four = (files.load(out / "checkpoints" / files.step_file(s))["state_dict"] for s in (3, 4))
    change = sum((four[k] - three[k]).double().square().sum() for k in four).sqrt()
    size = sum(three[k].double().square().sum() for k in four).sqrt()
    assert scalars(out)["optim/update_ratio"] == [(4, pytest.approx((change / size).item(), rel=1e-4))]


def test_validation_uses_the_average(finished: Path) -> None:
    content = checkpoint(finished)
    names = content["average"].keys()
    assert names == content["state_dict"].keys()
    assert any(not torch.equal(content["average"][n], content["state_dict"][n]) for n in names)
    measured = evaluate(plan("job=evaluate", f"ckpt={finished / 'checkpoints' / 'last.ckpt'}", "trainer=cpu"))
    assert measured == pytest.approx(json.loads((finished / "metrics.json").read_text())["val/loss"], rel=1e-6)


def test_samples_are_of_the_average(finished: Path, tmp_path: Path) -> None:
    """What was shown at the end is what the checkpoint, which gives its average, writes."""
    out = tmp_path / "out.jsonl"
    last = finished / "checkpoints" / "last.ckpt"
    generate(plan("job=generate", f"ckpt={last}", "trainer=cpu", f"out={out}", "decoding.max_new_tokens=4"))
    assert json.loads(out.read_text())["text"] in (finished / "run.log").read_text()


def test_half_precision_weights_are_measured_in_full(tmp_path: Path) -> None:
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", "max_steps=3", "validate_every=3"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'half'}", "trainer.precision=bf16-true"))
    train(plan(*args, f"paths.run_dir={tmp_path / 'full'}"))
    half, full = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("half", "full"))
    for tag in ("val/loss", "val/bits_per_byte", "train/bits_per_byte"):
        assert half[tag] == pytest.approx(full[tag], rel=5e-3)
    assert half["val/loss"] / half["val/bits_per_byte"] == pytest.approx(full["val/loss"] / full["val/bits_per_byte"])


def test_matrix_products_of_less_precision(tmp_path: Path) -> None:
    """What is measured hardly changes; whether anything does depends on the CPU."""
    losses = {}
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", "max_steps=8", "validate_every=8"]
    for name in ("highest", "medium"):
        out = tmp_path / name
        assert run(*args, f"paths.run_dir={out}", f"trainer.matmul_precision={name}").returncode == 0
        losses[name] = json.loads((out / "metrics.json").read_text())["val/loss"]
        assert ("medium in matrix products" in (out / "run.log").read_text()) == (name == "medium")
    assert losses["medium"] == pytest.approx(losses["highest"], rel=5e-3)
    wrong = run(*args, f"paths.run_dir={tmp_path / 'wrong'}", "trainer.matmul_precision=low")
    assert wrong.returncode == 2
    assert "trainer.matmul_precision=low; expected highest, high or medium" in wrong.stderr


@pytest.mark.parametrize(("trainer", "expected"), [("auto", "medium"), ("cpu", "highest")])
def test_the_process_multiplies_as_the_trainer_says(
    trainer: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("lmexp.job.train.train", lambda _: seen.append(torch.get_float32_matmul_precision()))
    try:
        run_here(plan(f"trainer={trainer}"))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [expected]


def test_the_average_is_that_of_the_formula(tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={out}", "max_steps=3"]
    more = ["callback.checkpoint.every_steps=1", "callback.checkpoint.keep=9", "callback.average.decay=0.75"]
    train(plan(*args, *more, "validate_every=3"))
    steps = [files.load(out / "checkpoints" / files.step_file(s)) for s in (1, 2, 3)]
    for name, average in steps[2]["average"].items():
        expected = steps[0]["average"][name]
        for s in (1, 2):
            expected = 0.75 * expected + 0.25 * steps[s]["state_dict"][name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_agrees_with_the_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    evaluate(plan("job=evaluate", f"ckpt={finished}", "trainer=cpu", f"out={out}"))
    measured = json.loads(out.read_text())
    assert measured["validation/loss"] == pytest.approx(checkpoint(finished)["lmexp"]["best"]["score"], rel=1e-6)
    whole = evaluate(plan("job=evaluate", f"ckpt={finished}", "trainer=cpu", "job.split=train"))
    assert whole > 0


def test_generation_streams_and_repeats(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(*overrides: str) -> list[dict[str, str]]:
        out = tmp_path / "out.jsonl"
        generate(plan("job=generate", f"ckpt={finished}", "trainer=cpu", f"out={out}", *overrides))
        return [json.loads(line) for line in out.read_text().splitlines()]

    one = written("job.prompt=the model", "decoding.max_new_tokens=12")
    shown = capsys.readouterr().out
    assert "the model" + one[0]["text"] in shown
    assert written("job.prompt=the model", "decoding.max_new_tokens=12") == one
    assert written("job.prompt=the model", "decoding.max_new_tokens=12", "decoding.seed=5") != one
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the model\na line\n")
    several = written(f"job.prompt_file={prompts}", "job.samples=2", "decoding.max_new_tokens=12", "job.batch_size=3")
    assert [row["prompt"] for row in several] == ["the model", "the model", "a line", "a line"]
    assert several[0]["text"] == one[0]["text"]  # a row does not depend on those beside it
    assert several[0]["text"] != several[1]["text"]
    greedy = written("decoding=greedy", "job.prompt=the", "decoding.max_new_tokens=5")
    assert greedy == written("decoding=greedy", "job.prompt=the", "decoding.max_new_tokens=5", "decoding.seed=9")


@pytest.mark.slow
def test_prompts_from_standard_input(finished: Path) -> None:
    done = run("job=generate", f"ckpt={finished}", "job.prompt_file=-", "trainer=cpu", input="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert "--- 'two'" in done.stdout


def test_a_finished_run_has_nothing_left_to_do(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "checkpoints" / "last.ckpt").read_bytes()
    (finished / "metrics.json").unlink()  # as if it had been killed just before the end
    again = yaml.safe_load((finished / "config.yaml").read_text())
    args = [
        *TINY,
        f"data.corpus.path={again['data']['corpus']['path']}",
        f"paths.cache_dir={again['paths']['cache_dir']}",
    ]
    more = ["max_steps=12", "validate_every=5", "log_every=4", "callback.average.decay=0.5", "resume=auto"]
    train(plan(*args, *more, f"paths.run_dir={finished}"))
    assert "nothing is left to train" in capsys.readouterr().out
    assert json.loads((finished / "metrics.json").read_text())["steps"] == 12
    assert (finished / "checkpoints" / "last.ckpt").read_bytes() == before


def test_max_time_ends_a_run_as_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={out}"]
    train(plan(*args, "max_time=4s", "max_steps=1000000", "validate_every=1000000", "callback.progress.lines_every=1"))
    shown = re.findall(r"step (\d+)/(\d+) .* (\d+):(\d+) left", capsys.readouterr().out)
    assert shown
    assert all(int(step) < int(end) < 1000000 and 60 * int(m) + int(s) <= 4 for step, end, m, s in shown)
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 < metrics["steps"] < 1000000
    assert "val/loss" in metrics
    assert checkpoint(out)["lmexp"]["step"] == metrics["steps"]
    rates = [v for _, v in sorted(scalars(out)["optim/lr"])]
    assert rates[-1] < 0.1 * max(rates)  # it came down in time, though a millionth of the steps was made


@pytest.mark.slow
def test_max_time_ends_two_processes_together(tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={out}", "schedule=cosine"]
    args.append("schedule.final=0")
    done = run(*args, "trainer=ddp_sim", "max_time=5s", "max_steps=1000000", "validate_every=1000000")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 < metrics["steps"] < 1000000
    assert checkpoint(out)["lmexp"]["step"] == metrics["steps"]
    rates = [v for _, v in sorted(scalars(out)["optim/lr"])]
    assert rates[-1] < 0.1 * max(rates)
    again = run(*args, "trainer=ddp_sim", "max_time=5s", "max_steps=1000000", "resume=auto", "validate_every=1000000")
    assert again.returncode == 0, again.stderr
    assert "nothing is left to train" in again.stdout


@pytest.mark.slow
def test_a_compiled_runs_checkpoint_loads_uncompiled(tmp_path: Path) -> None:
    args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", "max_steps=6", "validate_every=6"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'plain'}"))
    train(plan(*args, f"paths.run_dir={tmp_path / 'compiled'}", "trainer.compile=true"))
    one, two = checkpoint(tmp_path / "plain"), checkpoint(tmp_path / "compiled")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    measured = evaluate(plan("job=evaluate", f"ckpt={tmp_path / 'compiled'}", "trainer=cpu"))
    expected = json.loads((tmp_path / "compiled" / "metrics.json").read_text())["val/loss"]
    assert measured == pytest.approx(expected, rel=1e-5)
    a, b = (dict(scalars(tmp_path / name)["train/loss"]) for name in ("plain", "compiled"))
    assert [a[s] for s in sorted(a)] == pytest.approx([b[s] for s in sorted(b)], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_overfits_one_batch(tmp_path: Path, name: str) -> None:
    """Composed as shipped, built small: with one batch over and over its loss falls to nearly nothing."""
    block = 112 if name in PAIRS else 64 if name in LABELS else 32
    small = ["model.n_layers=2", "model.d_model=64", "model.n_heads=2", f"data.block_size={block}", "batch_size=4"]
    small += [f"model.max_length={block}"]
    if name in LABELS:
        small += [*labelled_files(tmp_path), "task.dropout=0", "metric.bootstrap=0"]
    if name in PAIRS:
        small += [*paired_files("pairs", tmp_path), "task.label_smoothing=0", "callback.answers.examples=2"]
        small += ["max_steps=400", *PAIRS[name]]
    if name in LABELS or name in PAIRS:
        small += ["schedule.warmup=0", "optimizer.lr=0.03", "optimizer.weight_decay=0", "model.d_ff=128"]
    if name in PRETRAINED and name != "gpt2":
        small += ["init_from=null"]
    if name in PAPERS:
        small += ["data=files", "data.corpus.by=tail", "schedule.warmup=0", "max_steps=400", *PAPERS[name]]
    if name in PAPERS or name in NEED_A_TEXT:
        small += [corpus(tmp_path)]
    if name in PRETRAINED:
        tokenizer = BPE(vocab_size=300).train(iter(["the model reads a line and writes another one of them"]))
        small += [f"tokenizer.path={tokenizer.save(tmp_path)}"]
    elif name not in NEED_A_TEXT:
        small += [f"tokenizer.vocab_size={1000 if 'lingual' in name else 400}"]
    target = compose_target(name)
    if target not in ("FastConfig", "LlamaConfig"):
        small += ["model.dropout=0"]
    if target == "BertConfig":
        small += ["max_steps=400"]
    if target in ("BertConfig", "TransformerConfig"):
        small += ["model.attention_dropout=0"]
    if "cldr" in str(plan(f"experiment={name}").choices["data"]):
        small += ["data.corpus.phrases=200"]
    small += ["optimizer=muon_nano", "schedule=linear"]  # the rates for narrow models
    args = [f"experiment={name}", "debug=overfit", *small, "trainer=cpu", "data.validation_blocks=2"]
    args += [
        f"paths.cache_dir={tmp_path / 'cache'}",
        f"paths.run_dir={tmp_path / 'run'}",
        *([] if name in LABELS else ["callback.samples.prompts=[]"]),
    ]
    train(plan(*args))
    curve = [value for _, value in scalars(tmp_path / "run")["train/loss"]]
    assert curve[0] > (0.3 if name in LABELS else 2)
    assert curve[-1] < 0.1


def labelled_files(folder: Path) -> list[str]:
    """The overrides that name a few texts with labels."""
    path = folder / "labelled.jsonl"
    rows = [{"text": f"the line {i} is {'good' if i % 2 else 'bad'}", "label": "yn"[i % 2]} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["data=labelled_files", f"data.corpus.train={path}", f"data.corpus.validation={path}"]


def compose_target(name: str) -> str:
    return str(plan(f"experiment={name}").config.model._target_).rpartition(".")[2]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_fits_as_shipped(name: str) -> None:
    """At its real size, on the meta device."""
    check(plan(f"experiment={name}", "data.corpus.path=x" if name in NEED_A_TEXT else "", "trainer=cpu").config, 1)


@pytest.mark.parametrize("name", ["pretrain", "shakespeare_char", "pretrain_mlm", "pretrain_span", "pretrain_denoise"])
def test_experiments_fit_with_other_parts(name: str) -> None:
    text = ["data.corpus.path=x"] if name in NEED_A_TEXT else []
    model = {"pretrain_mlm": "bert", "pretrain_span": "transformer", "pretrain_denoise": "t5_v1_1_small"}
    other = [f"model={model.get(name, 'llama')}", "optimizer=adamw", "tokenizer=byte", "schedule=cosine"]
    check(plan(f"experiment={name}", *text, *other, "trainer=cpu").config, 1)


def test_multirun_gives_each_job_a_directory(tmp_path: Path) -> None:
    done = run(
        "-m",
        *TINY,
        corpus(tmp_path),
        "max_steps=3",
        "optimizer.lr=0.01,0.02",
        "seed=1,2",
        f"paths.cache_dir={tmp_path / 'cache'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "logs" / "sweeps").iterdir()
    jobs = sorted(p for p in sweep.iterdir() if (p / "checkpoints").is_dir())
    assert len(jobs) == 4
    seen = set()
    for job in jobs:
        assert (job / "metrics.json").exists()
        config = yaml.safe_load((job / "config.yaml").read_text())
        seen.add((config["optimizer"]["lr"], config["seed"]))
        assert f"optimizer.lr={config['optimizer']['lr']},seed={config['seed']}" in job.name
    assert seen == {(0.01, 1), (0.01, 2), (0.02, 1), (0.02, 2)}


@pytest.mark.slow
def test_two_runs_started_at_once_do_not_share_a_directory(tmp_path: Path) -> None:
    args = [sys.executable, str(ROOT / "run.py"), *TINY, corpus(tmp_path), "max_steps=2"]
    both = [subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    runs = list((tmp_path / "logs" / "pretrain").iterdir())
    assert len(runs) == 2
    assert all((r / "metrics.json").exists() for r in runs)


def test_every_key_of_the_configuration_is_read(tmp_path: Path) -> None:
    """Every key of the root is read by the jobs; what a group holds goes to its target, which refuses other keys."""
    jobs = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "lmexp" / "job").glob("*.py"))
    root = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    trainer = yaml.safe_load((ROOT / "conf" / "trainer" / "base.yaml").read_text())
    own = {p: yaml.safe_load(p.read_text()) for p in (ROOT / "conf" / "job").glob("*.yaml")}
    for key in root.keys() - {"defaults", "hydra"}:
        assert f"cfg.{key}" in jobs or f"config.{key}" in jobs or f'"{key}"' in jobs, key
    for key in trainer:
        assert f"trainer.{key}" in jobs, key
    for path, keys in own.items():
        source = (ROOT / "lmexp" / "job" / f"{path.stem}.py").read_text()
        for key in keys.keys() - {"_target_"}:
            assert f"job.{key}" in source or f'"{key}"' in source, f"{path}: {key}"
    for key in yaml.safe_load((ROOT / "conf" / "paths" / "default.yaml").read_text()):
        used = jobs + "".join(p.read_text() for p in (ROOT / "conf").rglob("*.yaml"))
        assert f"paths.{key}" in used, key
