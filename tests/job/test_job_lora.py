"""Runs that train adapters alone: exact when resumed, and merged for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from lmexp.contracts import UserError
from lmexp.job.export import export
from lmexp.job.restore import restore
from lmexp.job.train import train
from lmexp.task.base import BaseTask
from tests.job.test_job_classification import arguments as labelled
from tests.job.test_job_objectives import crash
from tests.job.test_job_objectives import data as pairs
from tests.runs import TINY, assert_same, checkpoint, corpus, plan, scalars

LORA = "task.lora={rank:2,alpha:8}"


def arguments(folder: Path) -> list[str]:
    common = [*TINY, corpus(folder), "model=gpt", "optimizer=adamw", "optimizer.lr=0.01", "max_steps=12"]
    return [*common, "validate_every=6", "callback.checkpoint.every_steps=4", f"paths.cache_dir={folder / 'cache'}"]


def test_a_run_that_crashed_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    train(plan(*arguments(tmp_path), f"paths.run_dir={base}", "max_steps=3"))
    args = [*arguments(tmp_path), LORA, f"init_from={base}", f"tokenizer.path={base / 'tokenizer.json'}"]
    args = [*(a for a in args if a != "tokenizer=byte"), "tokenizer=pretrained"]
    args.sort(key=lambda a: a.startswith("tokenizer.path"))
    train(plan(*args, f"paths.run_dir={tmp_path / 'whole'}"))
    parts = f"paths.run_dir={tmp_path / 'parts'}"
    with monkeypatch.context() as patch:
        patch.setattr(BaseTask, "_mean_and_clip", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(plan(*args, parts))
    train(plan(*args, parts, "resume=auto"))
    whole, parted = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for name in ("state_dict", "optimizer_states"):
        assert_same(whole[name], parted[name], name)

    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    d = 16  # qkv, output, expand, contract of each of two layers
    assert metrics["parameters/trained"] == 2 * 2 * ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))
    before = checkpoint(base)["state_dict"]
    for name, value in whole["state_dict"].items():
        plain = name.replace(".base_layer.", ".")
        if plain in before:
            assert torch.equal(value, before[plain]), name

    out = tmp_path / "exported"
    export(plan("job=export", f"ckpt={tmp_path / 'whole'}", f"out={out}"))
    model = restore(plan("job=evaluate", f"ckpt={tmp_path / 'whole'}", "trainer=cpu"), 1).task.model.eval()
    theirs = hf.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.arange(40, 52)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.head(model(tokens)), rtol=1e-5, atol=1e-5)


def test_a_pretrained_decoder_learns_to_answer(tmp_path: Path) -> None:
    """The recipe `finetune_lora` in small: a decoder pretrained on text gets adapters for pairs, whose loss falls; what
    it was before stays to the bit but for the new separator's row, and the merged export has the same logits."""
    model = ["model=llama", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1", "model.d_model=32"]
    model += ["model.d_ff=64", "trainer=cpu", "batch_size=8", "callback.samples.prompts=[]", "optimizer=adamw"]
    model += [f"paths.cache_dir={tmp_path / 'cache'}", "data.block_size=112"]
    paired = [o for o in pairs("pairs_decoder", tmp_path) if not o.startswith("data.block_size")]  # writes the files
    base = tmp_path / "base"
    text = ["data=files", "data.corpus.by=tail", f"data.corpus.path={tmp_path}/train.*", "tokenizer=byte"]
    train(plan(*model, *text, "max_steps=60", "validate_every=60", "optimizer.lr=0.01", f"paths.run_dir={base}"))
    args = [*model, *paired, "tokenizer=pretrained", f"tokenizer.path={base / 'tokenizer.json'}"]
    args += ["objective=text_to_text", "objective.max_target=48", f"init_from={base}", "max_steps=60"]
    args += ["task.lora={rank:8,alpha:16}", "optimizer.lr=0.02", "optimizer.weight_decay=0", "validate_every=60"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'run'}"))
    losses = [value for _, value in scalars(tmp_path / "run")["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    before, after = checkpoint(base)["state_dict"], checkpoint(tmp_path / "run")["state_dict"]
    kept = {name.replace(".base_layer.", "."): value for name, value in after.items()}
    for name, value in before.items():
        assert torch.equal(kept[name][: len(value)], value), name

    out = tmp_path / "exported"
    export(plan("job=export", f"ckpt={tmp_path / 'run'}", f"out={out}"))
    ours = restore(plan("job=evaluate", f"ckpt={tmp_path / 'run'}", "trainer=cpu"), 1).task.model.eval()
    theirs = hf.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.head(ours(tokens)), rtol=1e-5, atol=1e-5)


def test_a_classifier_trains_its_head_too(tmp_path: Path) -> None:
    args = [*labelled(tmp_path), "optimizer=adamw", LORA, f"paths.run_dir={tmp_path / 'run'}"]
    train(plan(*args))
    state = checkpoint(tmp_path / "run")["state_dict"]
    model = restore(plan("job=evaluate", f"ckpt={tmp_path / 'run'}", "trainer=cpu"), 1).task.model
    trained = {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in state if "lora_" in name or ".head." in name} == trained


def test_freezing_and_adapters_exclude_one_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.freeze=\['embed'\] with task.lora"):
        train(plan(*arguments(tmp_path), LORA, "task.freeze=[embed]", f"paths.run_dir={tmp_path / 'run'}"))
