"""Users' mistakes: exit code 2, one message that names the thing and the fix, no traceback, nothing half-made."""

from __future__ import annotations

import errno
import gzip
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lmexp.contracts import StorageError, UserError
from lmexp.job.check import check, seconds_of
from lmexp.job.errors import exit_code_of_errors
from lmexp.job.evaluate import evaluate
from lmexp.job.train import refuse_changes, train
from tests.runs import ROOT, TINY, checkpoint, command, corpus, plan, run


def refused(done: subprocess.CompletedProcess[str], *words: str) -> str:
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stderr.count("Error: ") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in {done.stderr!r}"
    return done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=gtp"], ["model=gtp", "Did you mean gpt"]),
        (["modle=gpt"], ["modle", "Did you mean model"]),
        (["experiment=pretrian"], ["experiment=pretrian", "Did you mean pretrain"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "Did you mean optimizer.lr"]),
        (["max_step=1"], ["max_step", "Did you mean max_steps"]),
        (["data.corpus.path=x.txt"], ["data.corpus.path", "data=files"]),
        (["job.prompt=a,b"], ["quotes"]),
        (["model=null"], ["null", "--help"]),
        (["--config-name=other"], ["other", "config"]),
    ],
)
def test_command_lines_that_cannot_be_composed(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    refused(run(*overrides, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


def test_all_misfits_are_told_at_once() -> None:
    wrong = plan(*TINY, "data.corpus.path=x.txt", "batch_size=0", "max_steps=abc", "optimizer.lr=-1", "model.n_heads=3")
    with pytest.raises(UserError) as caught:
        check(wrong.config, 1)
    text = str(caught.value)
    assert text.startswith("4 things do not fit")
    for word in ("batch_size=0", "max_steps=abc", "optimizer.lr=-1", "n_heads=3"):
        assert word in text


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (["trainer.devices=2"], 2, ["trainer.devices=2", "trainer=ddp_sim"]),
        (["trainer=ddp_sim", "batch_size=7"], 2, ["batch_size=7", "batch_size=6 or 8"]),
        (["trainer.micro_batch_size=3"], 1, ["batch_size=8", "batch_size=6 or 9", "micro_batch_size=2 or 4"]),
        (["trainer.precision=16"], 1, ["trainer.precision=16", "bf16-mixed"]),
        (["trainer=tp_fsdp_sim", "trainer.devices=3"], 3, ["trainer.tensor_parallel=2", "3 devices"]),
        (
            ["trainer=ddp_sim", "trainer.tensor_parallel=2"],
            2,
            ["trainer.tensor_parallel=2 with trainer.strategy=ddp", "tp_fsdp"],
        ),
        (["trainer.tensor_parallel=0"], 1, ["trainer.tensor_parallel=0", "at least 1"]),
        (["trainer=tp_fsdp_sim", "trainer.compile=true"], 2, ["trainer.tensor_parallel=2 with trainer.compile=true"]),
        (["callback.checkpoint.sharded=true"], 1, ["callback.checkpoint.sharded=true", "trainer=fsdp"]),
        (
            ["trainer=fsdp_sim", "callback.checkpoint.sharded=true", "callback.checkpoint.background=true"],
            2,
            ["callback.checkpoint.sharded=true with callback.checkpoint.background=true"],
        ),
        (["trainer.accelerator=tpu"], 1, ["trainer.accelerator=tpu"]),
        (["+optimizer.foo=1"], 1, ["optimizer", "foo"]),
        (["callback.checkpoint.monitor=val/los"], 1, ["callback.checkpoint.monitor=val/los", "val/loss"]),
        (["max_time=soon"], 1, ["max_time=soon", "90s"]),
        (["resume=maybe"], 1, ["resume=maybe", "auto"]),
        (["data.block_size=1"], 1, ["data.block_size=1"]),
        (["schedule=wsd", "schedule.decay=2.5"], 1, ["schedule.decay=2.5"]),
        (["schedule=wsd", "schedule.warmup=500", "schedule.decay=600"], 1, ["more than max_steps=1000"]),
        (["trainer.strategy=zero"], 1, ["trainer.strategy=zero", "single, ddp or fsdp"]),
        (["callback.average.decay=2"], 1, ["callback.average.decay=2"]),
        (["callback.checkpoint.keep=null"], 1, ["callback.checkpoint.keep=None"]),
        (["callback.checkpoint=null"], 1, ["callback.checkpoint is missing"]),
        (["callback.tracking=null"], 1, ["callback.tracking is missing"]),
        (["callback.samples.prompts=hello"], 1, ["callback.samples.prompts=hello", "list"]),
        (["data.block_size=64", "model.max_length=32"], 1, ["data.block_size=64 is more than model.max_length=32"]),
        (["data.bpe_dropout=1"], 1, ["data.bpe_dropout=1;", "below 1"]),
        (["data.bpe_dropout=null"], 1, ["data.bpe_dropout=None"]),
        (["data.bpe_dropout=0.1"], 1, ["data.bpe_dropout=0.1: objective CausalLM does not read each text whole"]),
        (["data.block_size=16.5"], 1, ["data.block_size=16.5"]),
        (["data.batch_tokens=100"], 1, ["batch_size=8 and data.batch_tokens=100; expected one of them"]),
        (["batch_size=null"], 1, ["batch_size=None and data.batch_tokens=None; expected one of them"]),
        (["batch_size=null", "data.batch_tokens=100"], 1, ["objective CausalLM", "batch_size=6"]),
        (["batch_size=null", "data.batch_tokens=true"], 1, ["data.batch_tokens=True"]),
        (["data.corpus.validation_fraction=0"], 1, ["no validation split", "data.corpus.validation"]),
        (["model.n_layers=2.5"], 1, ["model cannot be made", "n_layers=2.5"]),
        (["optimizer.lr=abc"], 1, ["optimizer cannot be made", "lr=abc"]),
        (["task.clip_norm=abc"], 1, ["task cannot be made", "clip_norm=abc"]),
        (["+task.foo=1"], 1, ["task cannot be made", "foo"]),
        (["+max_step=5"], 1, ["max_step=5", "no such key"]),
        (["+trainer.precison=x"], 1, ["trainer.precison=x", "no such key"]),
    ],
)
def test_configurations_that_do_not_fit(
    tmp_path: Path, overrides: list[str], world_size: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check(plan(*TINY, corpus(tmp_path), *overrides).config, world_size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such device here; use trainer=cpu"):
        check(plan(*TINY, corpus(tmp_path), "trainer=gpu").config, 1)


def test_times() -> None:
    assert [seconds_of(t) for t in (None, 90, "90s", "1.5m", "2h", "1d")] == [None, 90, 90, 90, 7200, 86400]


def where(folder: Path, out: Path) -> list[str]:
    return [f"paths.cache_dir={folder / 'cache'}", f"paths.run_dir={out}", "max_steps=2"]


CORPORA = {
    "missing.txt": (None, "there is no such file"),
    "empty.txt": (b"", "holds no text"),
    "latin1.txt": ("café ".encode("latin1") * 50, "is not UTF-8"),
    "short.txt": (b"few", "needs"),
    "cut.txt.gz": (gzip.compress(os.urandom(3000).hex().encode())[:-200], "damaged or cut off"),
    "cut.parquet": (b"PAR1" + b"x" * 100, "damaged or cut off"),
    "no_column.jsonl": (b'{"words": "a b"}\n', "no column 'text'"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    content, word = CORPORA[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "logs" / "run"
    tiny = [o for o in TINY if name.endswith(("txt", "gz")) or "by=tail" not in o]
    with pytest.raises(UserError, match=word) as caught:
        train(plan(*tiny, f"data.corpus.path={path}", *where(tmp_path, out)))
    assert name in str(caught.value) or "block_size" in str(caught.value)
    assert not out.exists()


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        train(plan(*TINY, corpus(tmp_path), *where(tmp_path, trained)))


def test_a_resumed_run_may_not_compute_something_else(tmp_path: Path, trained: Path) -> None:
    before = checkpoint(trained)["lmexp"]["step"]
    with pytest.raises(UserError) as caught:
        train(plan(*TINY, corpus(trained.parent), *where(trained.parent, trained), "resume=auto", "optimizer.lr=0.5"))
    assert "optimizer.lr: was 0.012, now 0.5" in str(caught.value)
    same_name = corpus(trained.parent, n_words=2500)
    with pytest.raises(UserError, match="corpus is not the one"):
        train(plan(*TINY, same_name, *where(trained.parent, trained), "resume=auto"))
    assert checkpoint(trained)["lmexp"]["step"] == before


def test_a_run_of_before_a_key_was_added_goes_on(tmp_path: Path) -> None:
    now = plan(*TINY, corpus(tmp_path)).config
    before = OmegaConf.to_container(now)
    assert isinstance(before, dict)
    del before["data"]["bpe_dropout"]
    refuse_changes(now, before)
    refuse_changes(OmegaConf.create(before), before)
    with pytest.raises(UserError, match=r"data\.bpe_dropout: was 0\.0, now 0\.1"):
        refuse_changes(plan(*TINY, corpus(tmp_path), "data.bpe_dropout=0.1").config, before)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A small finished run."""
    out = tmp_path / "trained"
    train(plan(*TINY, corpus(tmp_path), *where(tmp_path, out)))
    return out


def evaluated(ckpt: Path | str, *more: str) -> None:
    from lmexp.job.evaluate import evaluate

    evaluate(plan("job=evaluate", f"ckpt={ckpt}", "trainer=cpu", *more))


def test_checkpoints_that_cannot_be_used(tmp_path: Path, trained: Path) -> None:
    good = (trained / "checkpoints" / "last.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"

    with pytest.raises(UserError, match="does not exist"):
        evaluated(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="needs a checkpoint"):
        evaluated("null")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="directory without checkpoints"):
        evaluated(tmp_path / "empty")
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="damaged"):
        evaluated(bad)
    bad.write_text("not a checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        evaluated(bad)
    torch.save({"state_dict": {}}, bad)
    with pytest.raises(UserError, match="not a checkpoint of lmexp"):
        evaluated(bad)
    torch.save({"lmexp": Path("x"), "state_dict": {}}, bad)
    with pytest.raises(UserError, match="pickled object"):
        evaluated(bad)


def test_a_checkpoint_of_another_model_or_tokenizer(tmp_path: Path, trained: Path) -> None:
    bad = tmp_path / "bad.ckpt"
    content = checkpoint(trained)
    content["lmexp"]["config"]["model"] = {
        "_target_": "lmexp.model.gpt.GPTConfig",
        **{key: content["lmexp"]["config"]["model"][key] for key in ("n_layers", "n_heads", "d_model", "max_length")},
    }
    torch.save(content, bad)
    with pytest.raises(UserError, match="does not belong to the model of its configuration"):
        evaluated(bad)
    content = checkpoint(trained)
    from lmexp.tokenizer.char import CharTokenizer

    content["lmexp"]["tokenizer"] = CharTokenizer("abc").to_json()
    torch.save(content, bad)
    with pytest.raises(UserError, match="in the file"):
        evaluated(bad)
    with pytest.raises(UserError, match="the checkpoint decides"):
        evaluated(trained, "tokenizer=char")
    with pytest.raises(UserError, match="the checkpoint decides"):
        evaluated(trained, "model.n_layers=3")


def test_resume_falls_back_from_a_damaged_checkpoint(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [*TINY, corpus(tmp_path), *where(tmp_path, trained), "resume=auto", "max_steps=4", "validate_every=2"]
    before = checkpoint(trained)["lmexp"]["step"]
    newest = trained / "checkpoints" / "step-000000009.ckpt"
    newest.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    config = [c for c in config if not c.startswith("validate")]
    train(plan(*config))
    assert "Falling back to step-000000002.ckpt" in capsys.readouterr().out
    assert before == 2
    assert newest.with_suffix(".damaged").exists()
    assert checkpoint(trained)["lmexp"]["step"] == 4


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    mounted = False
    if os.geteuid() == 0:  # root may write anywhere but on a read-only file system
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(locked)], check=False).returncode:
            pytest.skip("no tmpfs can be mounted here")
        mounted = True
    try:
        with pytest.raises(UserError, match="cannot write to"):
            train(plan(*TINY, corpus(tmp_path), *where(tmp_path, locked / "run")))
        args = [*TINY, corpus(tmp_path), f"paths.cache_dir={locked / 'cache'}", "max_steps=2"]
        with pytest.raises(UserError, match="cache"):
            train(plan(*args, f"paths.run_dir={tmp_path / 'run'}"))
        assert not (tmp_path / "run").exists()
    finally:
        if mounted:
            subprocess.run(["umount", str(locked)], check=True)


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        train(plan(*TINY, corpus(tmp_path), *where(tmp_path, tmp_path / "file" / "run")))


@pytest.mark.parametrize("validate_every", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, validate_every: int) -> None:
    out = tmp_path / "run"
    wild = ["model=gpt", "model.n_layers=1", "optimizer=adamw", "optimizer.lr=1e30", "task.clip_norm=null"]
    args = [*TINY, *wild, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={out}"]
    with pytest.raises(UserError) as caught:
        train(plan(*args, "max_steps=50", "log_every=5", "schedule.warmup=0", f"validate_every={validate_every}"))
    words = ["diverged", "norm of all weights", "lower learning rate", "gradient norm"]
    words += ["The batch was samples"] if validate_every == 50 else []
    for word in words:
        assert word in str(caught.value)
    assert not (out / "metrics.json").exists()
    assert not list((out / "checkpoints").glob("*.ckpt"))


def test_a_directory_left_by_a_refused_run_can_be_used(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="no such file"):
        train(plan(*TINY, "data.corpus.path=typo.txt", *where(tmp_path, out)))
    assert list(out.iterdir()) == []
    train(plan(*TINY, corpus(tmp_path), *where(tmp_path, out)))
    assert (out / "metrics.json").exists()


def test_event_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.other").write_bytes(b"theirs")
    with pytest.raises(UserError, match="no run of lmexp"):
        train(plan(*TINY, corpus(tmp_path), *where(tmp_path, tmp_path), "resume=auto"))
    assert (tmp_path / "events.out.tfevents.1.other").read_bytes() == b"theirs"


def test_resume_never_begins_anew_over_checkpoints_that_cannot_be_read(tmp_path: Path, trained: Path) -> None:
    args = [*TINY, corpus(tmp_path), *where(tmp_path, trained), "resume=auto"]
    (file,) = (trained / "checkpoints").glob("step-*.ckpt")
    content = checkpoint(trained)
    content["lmexp"]["format"] = 99
    torch.save(content, file)
    with pytest.raises(UserError, match="newer lmexp"):
        train(plan(*args))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="None of the checkpoints"):
        train(plan(*args))
    assert list(trained.glob("events.*"))


def test_what_came_with_a_checkpoint_is_not_called(tmp_path: Path, trained: Path) -> None:
    bad = tmp_path / "bad.ckpt"
    content = checkpoint(trained)
    content["lmexp"]["config"]["model"] = {"_target_": "pathlib.Path", "args": "x"}
    torch.save(content, bad)
    with pytest.raises(UserError, match=r"names pathlib\.Path, which is no part of lmexp"):
        evaluated(bad)


def test_outputs_are_checked_before_the_work(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        evaluated(trained, f"out={tmp_path / 'missing' / 'x.json'}")
    with pytest.raises(UserError, match="is a directory"):
        evaluated(trained, f"out={tmp_path}")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting needs root")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, sharded: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        args = [*TINY, corpus(tmp_path), f"paths.cache_dir={tmp_path / 'cache'}", f"paths.run_dir={disk / 'run'}"]
        args += ["max_steps=40", "validate_every=2", "callback.checkpoint.keep=100"]
        args += ["trainer=fsdp_sim", "callback.checkpoint.sharded=true"] if sharded else []
        done = run(*args)
        assert done.returncode == 1  # nothing was asked wrongly
        assert "is full" in done.stderr
        assert "resume=auto" in done.stderr
        assert "Traceback" not in done.stderr
        kept = checkpoint(disk / "run")
        assert 2 <= kept["lmexp"]["step"] < 40
        assert not list((disk / "run" / "checkpoints").glob(".*tmp"))
        assert evaluate(plan("job=evaluate", f"ckpt={disk / 'run'}", "trainer=cpu", "job.max_blocks=2")) > 0
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = run(*args, "resume=auto")
        assert again.returncode == 0, again.stderr
        assert f"after step {kept['lmexp']['step']}" in again.stdout
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_fails_while_a_run_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A network mount that is gone, and others, at the second checkpoint."""
    from lmexp.run import checkpoint as files

    run_dir, dump = tmp_path / "run", torch.save

    def fail(content: Any, file: Any) -> None:
        if content["lmexp"]["step"] == 4:
            raise OSError(number, os.strerror(number))
        dump(content, file)

    monkeypatch.setattr(files.torch, "save", fail)
    args = [*TINY, corpus(tmp_path), *where(tmp_path, run_dir), "validate_every=2"]
    with pytest.raises(StorageError, match="resume=auto") as caught:
        train(plan(*args, "max_steps=8"))
    assert os.strerror(number) in str(caught.value)
    assert checkpoint(run_dir)["lmexp"]["step"] == 2
    assert not list((run_dir / "checkpoints").glob(".*tmp"))
    monkeypatch.undo()
    train(plan(*args, "max_steps=8", "resume=auto"))
    assert checkpoint(run_dir)["lmexp"]["step"] == 8


@pytest.mark.slow
def test_a_mistake_in_a_job_of_several_processes_is_told_once(tmp_path: Path) -> None:
    done = run(*TINY, corpus(tmp_path), "trainer=ddp_sim", "batch_size=7", *where(tmp_path, tmp_path / "run"))
    refused(done, "batch_size=7", "batch_size=6 or 8")
    assert not (tmp_path / "run").exists()


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    from lmexp.contracts import Interrupted

    for error, code in ((UserError("x"), 2), (Interrupted("x"), 75), (KeyboardInterrupt(), 1)):
        with pytest.raises(SystemExit) as caught, exit_code_of_errors():
            raise error
        assert caught.value.code == code
    with pytest.raises(RuntimeError), exit_code_of_errors():
        raise RuntimeError("a bug stays visible")
    assert ROOT.joinpath("run.py").is_file()
    assert command("x")[1].endswith("run.py")


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    done = run(
        "-m",
        *TINY,
        corpus(tmp_path),
        "max_steps=2",
        "batch_size=0,4",
        f"paths.cache_dir={tmp_path / 'cache'}",
        cwd=tmp_path,
    )
    refused(done, "batch_size=0", "1 of the sweep's jobs failed")
    assert len(list((tmp_path / "logs" / "sweeps").glob("*/*/metrics.json"))) == 1
