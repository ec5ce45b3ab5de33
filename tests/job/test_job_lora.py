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
from tests.runs import TINY, assert_same, checkpoint, corpus, plan

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
