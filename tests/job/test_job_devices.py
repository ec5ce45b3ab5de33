"""Many devices: the numbers of one, whatever holds the weights and however often their number changes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmexp.contracts import StorageError
from lmexp.job.evaluate import evaluate
from lmexp.job.export import export
from lmexp.job.train import train
from lmexp.run import checkpoint as files
from tests.runs import ROOT, TINY, assert_same, checkpoint, corpus, plan, run, scalars

FAMILIES: dict[str, tuple[str, ...]] = {
    "decoder": ("model=llama",),
    "encoder": (
        *("model=bert", "objective=masked_lm"),
        *("model.dropout=0.0", "model.attention_dropout=0.0"),  # dropout differs by the device
    ),
    "encoder_decoder": ("model=t5", "objective=span_corruption", "model.dropout=0.0"),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer=adamw", "optimizer.lr=0.003"),
    "muon": ("optimizer=muon", "optimizer.lr=0.005"),  # higher ones blow rounding up within these steps
}
# at the other groups' default rates so small a model makes of rounding's 1e-7 what lies between 1e-6 and 1e-4
CALM = (*OPTIMIZERS["muon"], *(f"optimizer.{of}_lr=0.003" for of in ("embedding", "head", "vector")))
STEPS = 20


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *TINY,
        corpus(folder),
        f"paths.cache_dir={folder / 'cache'}",
        f"paths.run_dir={folder / out}",
        f"max_steps={STEPS}",
        "validate_every=5",
        "log_every=5",
        "schedule=constant",
        "data.block_size=32",
        *more,
    ]


def assert_curves(one: Path, other: Path, relative: float, tags: tuple[str, ...] = ("train/loss", "val/loss")) -> None:
    a, b = scalars(one), scalars(other)
    for tag in tags:
        assert [s for s, _ in a[tag]] == [s for s, _ in b[tag]]
        assert [v for _, v in a[tag]] == pytest.approx([v for _, v in b[tag]], rel=relative), tag


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_pieces_train_as_whole_ones(tmp_path: Path, family: str, optimizer: str) -> None:
    """Bar: FSDP2 on 2 processes, 20 steps, to 1e-4 of one process, and it saves what that saves."""
    options = (*FAMILIES[family], *OPTIMIZERS[optimizer], "callback.average.decay=0.9", "trainer.micro_batch_size=2")
    train(plan(*arguments(tmp_path, "one", *options)))
    done = run(*arguments(tmp_path, "two", *options, "trainer=fsdp_sim", "trainer.recompute_activations=true"))
    assert done.returncode == 0, done.stderr
    assert_curves(tmp_path / "one", tmp_path / "two", 1e-4)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert one["average"].keys() == two["average"].keys()
    for key, value in one["optimizer_states"][0]["state"].items():
        assert {n: getattr(x, "shape", None) for n, x in value.items()} == {
            n: getattr(x, "shape", None) for n, x in two["optimizer_states"][0]["state"][key].items()
        }


SHARED_OUT: dict[str, tuple[str, ...]] = {
    "llama": ("model=llama", "model.n_heads=4", "model.n_kv_heads=2", "model.qk_norm=true"),
    "gpt": ("model=gpt", "model.dropout=0.0"),
    "fast": ("model=fast", "model.value_layers=1"),
    "bert": (*FAMILIES["encoder"], "trainer.micro_batch_size=4"),
    "t5": (*FAMILIES["encoder_decoder"], "trainer.recompute_activations=true"),
    # what is dropped is the same on devices that read the same
    "transformer": ("model=transformer", "objective=span_corruption", "model.dropout=0.1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", SHARED_OUT)
def test_weights_shared_out_train_as_whole_ones(tmp_path: Path, model: str, optimizer: str) -> None:
    """Tensor parallelism on 2 processes, to 1e-4 of one process; the checkpoint is whole."""
    options = (*SHARED_OUT[model], *OPTIMIZERS[optimizer], "callback.average.decay=0.9")
    train(plan(*arguments(tmp_path, "one", *options)))
    done = run(*arguments(tmp_path, "two", *options, "trainer=tp_fsdp_sim"))
    assert done.returncode == 0, done.stderr
    assert_curves(tmp_path / "one", tmp_path / "two", 1e-4)
    assert_curves(tmp_path / "one", tmp_path / "two", 5e-3, ("optim/grad_norm",))
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    for key in ("state_dict", "average"):
        assert {n: x.shape for n, x in one[key].items()} == {n: x.shape for n, x in two[key].items()}
        for name, value in one[key].items():
            if value.dim() == 2:  # of biases of keys, whose gradients are rounding alone, nothing is the same
                assert (value - two[key][name]).norm() < 1e-2 * value.norm(), name
    for key, value in one["optimizer_states"][0]["state"].items():
        assert {n: getattr(x, "shape", None) for n, x in value.items()} == {
            n: getattr(x, "shape", None) for n, x in two["optimizer_states"][0]["state"][key].items()
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "optimizer", "sharded", "theirs"),
    [
        ("decoder", "muon", "true", "AutoModelForCausalLM"),
        ("decoder", "adamw", "false", "AutoModelForCausalLM"),
        ("encoder", "muon", "false", "AutoModelForMaskedLM"),
        ("encoder", "adamw", "true", "AutoModelForMaskedLM"),
        ("encoder_decoder", "muon", "true", "AutoModelForSeq2SeqLM"),
        ("encoder_decoder", "adamw", "false", "AutoModelForSeq2SeqLM"),
    ],
)
def test_weights_in_pieces_resume_and_export(
    tmp_path: Path, family: str, optimizer: str, sharded: str, theirs: str
) -> None:
    """From two processes with pieces on to one as to two; the export is one file with the logits of the checkpoint."""
    transformers = pytest.importorskip("transformers")
    options = (*FAMILIES[family], *OPTIMIZERS[optimizer])
    in_pieces = ("trainer=fsdp_sim", f"callback.checkpoint.sharded={sharded}")
    done = run(*arguments(tmp_path, "pieces", *options, *in_pieces))
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "pieces", tmp_path / "whole", symlinks=True)
    done = run(*arguments(tmp_path, "pieces", *options, "max_steps=30", "resume=auto", *in_pieces))
    assert done.returncode == 0, done.stderr
    train(plan(*arguments(tmp_path, "whole", *options, "max_steps=30", "resume=auto")))
    assert_curves(tmp_path / "whole", tmp_path / "pieces", 1e-4)
    done = run("job=export", f"ckpt={tmp_path / 'pieces'}", f"out={tmp_path / 'hf'}", "trainer=cpu")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1
    exported: Any = getattr(transformers, theirs).from_pretrained(tmp_path / "hf").eval()
    from lmexp.job.restore import restore

    ours: Any = restore(plan("job=evaluate", f"ckpt={tmp_path / 'pieces'}", "trainer=cpu"), 1).task.model.eval()
    tokens = torch.randint(0, 200, (2, 16))
    both = (tokens, tokens.flip(1)) if family == "encoder_decoder" else (tokens,)
    told = {"decoder_input_ids": both[1]} if family == "encoder_decoder" else {}
    with torch.no_grad():
        logits = ours.head(ours(*both))[..., : exported.config.vocab_size]
        expected = exported(tokens, **told).logits
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()

    one, last = tmp_path / "one.ckpt", tmp_path / "pieces" / "checkpoints" / "last.ckpt"
    done = run("job=export", f"ckpt={last}", "format=checkpoint", f"out={one}", "trainer=cpu")
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(one, weights_only=True), files.load(last), "one file")
    assert not list(tmp_path.glob("one.ckpt.*"))


@pytest.mark.slow
def test_weights_shared_out_and_in_pieces_go_on_elsewhere(tmp_path: Path) -> None:
    """Four processes, two copies of a model of two, and on from there on one, which reads what they have read."""
    options = ("model=llama", *OPTIMIZERS["muon"], "optimizer.embedding_lr=0.003", "optimizer.head_lr=0.003")
    shared_out = ("trainer=tp_fsdp_sim", "trainer.devices=4", "trainer.micro_batch_size=2")
    train(plan(*arguments(tmp_path, "one", *options, "max_steps=16", "callback.average.decay=0.9")))
    in_pieces = ("callback.checkpoint.sharded=true", "callback.average.decay=0.9")
    done = run(*arguments(tmp_path, "four", *options, "max_steps=8", *shared_out, *in_pieces))
    assert done.returncode == 0, done.stderr
    done = run(*arguments(tmp_path, "four", *options, "max_steps=12", "resume=auto", *shared_out, *in_pieces))
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "four" / "checkpoints"
    kept = sorted(p.name for p in saved.glob("step-*.ckpt"))
    assert sorted(p.name for p in saved.glob("*-of-4")) == [f"{name}.{rank}-of-4" for name in kept for rank in range(4)]
    train(plan(*arguments(tmp_path, "four", *options, "max_steps=16", "resume=auto", "callback.average.decay=0.9")))
    assert_curves(tmp_path / "one", tmp_path / "four", 1e-4, ("train/loss",))
    measured = tmp_path / "measured.json"
    last = tmp_path / "four" / "checkpoints" / "last.ckpt"
    args = (f"ckpt={last}", f"out={measured}", f"paths.cache_dir={tmp_path / 'cache'}")
    done = run("job=evaluate", *args, "trainer=tp_fsdp_sim")
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "four" / "metrics.json").read_text())["val/loss"]
    assert json.loads(measured.read_text())["validation/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_dropout_goes_on_where_weights_are_shared_out(tmp_path: Path) -> None:
    """Devices that read the same drop the same, also after one device has come that far."""
    options = ("model=transformer", "objective=span_corruption", "model.dropout=0.1", *OPTIMIZERS["adamw"])
    train(plan(*arguments(tmp_path, "one", *options, "max_steps=12")))
    train(plan(*arguments(tmp_path, "two", *options, "max_steps=6")))
    done = run(*arguments(tmp_path, "two", *options, "max_steps=12", "resume=auto", "trainer=tp_fsdp_sim"))
    assert done.returncode == 0, done.stderr
    assert_curves(tmp_path / "one", tmp_path / "two", 1e-4, ("train/loss",))


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    options = ("model=gpt", "model.dropout=0.1")
    train(plan(*arguments(tmp_path, "kept", *options)))
    train(plan(*arguments(tmp_path, "again", *options, "trainer.recompute_activations=true")))
    assert_same(checkpoint(tmp_path / "kept")["state_dict"], checkpoint(tmp_path / "again")["state_dict"])


@pytest.mark.slow
def test_another_number_of_devices_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    """Bar: 2 processes to 1 to 2, with other micro-batches and workers: sample for sample and to 1e-5."""

    def go(out: str, steps: int, *how: str) -> None:
        (tmp_path / f"{out}-rows").mkdir(exist_ok=True)
        rows = f"+callback.rows={{_target_: planted.Rows, folder: {tmp_path / f'{out}-rows'}}}"
        args = arguments(
            tmp_path, out, "model=llama", *CALM, f"max_steps={steps}", "resume=auto", "validate_every=5", rows, *how
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *args], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr

    go("fixed", 30)
    go("elastic", 10, "trainer=ddp_sim", "trainer.micro_batch_size=2")
    go("elastic", 20, "trainer.micro_batch_size=8", "data.num_workers=2")
    go("elastic", 30, "trainer=ddp_sim", "data.num_workers=1")
    assert_curves(tmp_path / "fixed", tmp_path / "elastic", 1e-5)
    assert read_rows(tmp_path / "fixed-rows") == read_rows(tmp_path / "elastic-rows")


def read_rows(folder: Path) -> dict[int, list[int]]:
    """Step -> the rows of all devices, by rank."""
    lines = [json.loads(line) for path in folder.glob("rows-*.txt") for line in path.read_text().splitlines()]
    found: dict[int, list[int]] = {}
    for step, _, rows in sorted(lines, key=lambda line: line[:2]):
        found.setdefault(step, []).extend(rows)
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def two_nodes(args: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """The same command on two machines, both of them here."""
    port = free_port()
    started = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
        command += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", str(ROOT / "run.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [*command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "family", "optimizer", "sharded"),
    [
        ("ddp_sim", "decoder", "muon", "false"),
        ("fsdp_sim", "decoder", "adamw", "true"),
        ("fsdp_sim", "encoder_decoder", "muon", "true"),
        ("fsdp_sim", "encoder", "muon", "false"),
    ],
)
def test_two_machines(tmp_path: Path, trainer: str, family: str, optimizer: str, sharded: str) -> None:
    """Bar: two nodes of torchrun on loopback train to the losses of one process; one process goes on with what they
    saved, and it becomes one file with the same weights."""
    options = (*FAMILIES[family], *(CALM if optimizer == "muon" else OPTIMIZERS[optimizer]))
    train(plan(*arguments(tmp_path, "one", *options)))
    how = (f"trainer={trainer}", f"callback.checkpoint.sharded={sharded}", "max_steps=10")
    for done in two_nodes(arguments(tmp_path, "two", *options, *how)):
        assert done.returncode == 0, done.stderr
    saved = tmp_path / "two.ckpt"
    export(plan("job=export", f"ckpt={tmp_path / 'two'}", "format=checkpoint", f"out={saved}"))
    train(plan(*arguments(tmp_path, "two", *options, "resume=auto")))
    assert_curves(tmp_path / "one", tmp_path / "two", 1e-4)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["steps"] == STEPS
    assert torch.load(saved, weights_only=True)["lmexp"]["step"] == 10
    measured = evaluate(plan("job=evaluate", f"ckpt={saved}", "trainer=cpu"))
    assert measured == pytest.approx(dict(scalars(tmp_path / "two")["val/loss"])[10], rel=1e-5)


@pytest.mark.slow
def test_processes_that_go_on_from_different_places_end(tmp_path: Path) -> None:
    args = arguments(tmp_path, "two", "model=llama", "trainer=ddp_sim", "+callback.planted._target_=planted.Elsewhere")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *args], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 1
    assert "after the steps [0, 0] and the samples [0, 8]: they do not see the same files" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_machines_must_agree_on_the_directory(tmp_path: Path) -> None:
    args = [a for a in arguments(tmp_path, "two", "trainer=ddp_sim") if not a.startswith("paths.run_dir")]
    ended = two_nodes(args)
    assert all(done.returncode for done in ended)
    assert "set paths.run_dir" in ended[0].stderr


@pytest.mark.slow
def test_two_processes_write_in_the_background(tmp_path: Path) -> None:
    options = ("model=llama", "trainer=ddp_sim", "callback.checkpoint.every_steps=2", "max_steps=12")
    for name, background in (("front", "false"), ("back", "true")):
        done = run(*arguments(tmp_path, name, *options, f"callback.checkpoint.background={background}"))
        assert done.returncode == 0, done.stderr
    assert_same(checkpoint(tmp_path / "front")["state_dict"], checkpoint(tmp_path / "back")["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim", "tp_fsdp_sim"])
def test_half_precision_on_two_processes(tmp_path: Path, trainer: str) -> None:
    """bf16 on two as on one, as far as its rounding goes."""
    options = ("model=llama", "trainer.precision=bf16-mixed", *OPTIMIZERS["adamw"])
    train(plan(*arguments(tmp_path, "one", *options)))
    done = run(*arguments(tmp_path, "two", *options, f"trainer={trainer}"))
    assert done.returncode == 0, done.stderr
    assert_curves(tmp_path / "one", tmp_path / "two", 1e-2)


@pytest.mark.parametrize("steps", [12, 13])
def test_checkpoints_written_in_the_background_are_the_same(tmp_path: Path, steps: int) -> None:
    options = ("model=llama", f"max_steps={steps}", "callback.checkpoint.every_steps=2", "callback.average.decay=0.9")
    train(plan(*arguments(tmp_path, "front", *options)))
    train(plan(*arguments(tmp_path, "back", *options, "callback.checkpoint.background=true")))
    front, back = tmp_path / "front" / "checkpoints", tmp_path / "back" / "checkpoints"
    names = sorted(p.name for p in front.iterdir())
    assert sorted(p.name for p in back.iterdir()) == names
    for name in names:
        a, b = checkpoint(tmp_path / "front", name), checkpoint(tmp_path / "back", name)
        for key in ("state_dict", "optimizer_states", "average", "TextData"):
            assert_same(a[key], b[key], f"{name}/{key}")


def test_a_write_in_the_background_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, path: Path) -> None:
        if path.name == "step-000000004.ckpt":
            raise StorageError("the disk is full")
        files.save(content, path)

    monkeypatch.setattr("lmexp.callback.checkpoint.files", SimpleNamespace(**{**vars(files), "save": full}))
    options = ("callback.checkpoint.every_steps=2", "callback.checkpoint.background=true", "callback.checkpoint.keep=9")
    with pytest.raises(StorageError, match="the disk is full"):
        train(plan(*arguments(tmp_path, "run", *options)))
    assert checkpoint(tmp_path / "run")["lmexp"]["step"] == 2
    monkeypatch.undo()
    train(plan(*arguments(tmp_path, "run", *options, "resume=auto")))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == STEPS
