"""Files of a run: whole or not at all, one writer, curves without gap or overlap."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lmexp.contracts import UserError
from lmexp.run import checkpoint as files
from lmexp.run import events
from lmexp.run.directory import RunDirectory, disk_errors, new_run_id, write_atomically
from lmexp.run.environment import record
from lmexp.run.flops import PEAK_TFLOPS_BF16, peak_flops
from tests.runs import scalars


def content(value: float) -> dict[str, object]:
    return {"lmexp": {"format": 1}, "state_dict": {"w": torch.full((100,), value)}}


def test_a_checkpoint_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / files.step_file(7)
    files.save(content(1.0), path)
    assert torch.equal(files.load(path)["state_dict"]["w"], torch.ones(100))
    assert files.saved_steps(path.parent) == [7]
    assert [p.name for p in path.parent.iterdir()] == ["step-000000007.ckpt"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    files.save(content(1.0), path)

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="is full"):
        files.save(content(2.0), path)
    assert torch.equal(files.load(path)["state_dict"]["w"], torch.ones(100))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """Wherever they are: either the content is still right, or the file is refused."""
    path = tmp_path / "a.ckpt"
    files.save(content(1.0), path)
    whole = path.read_bytes()
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 400):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (int(place) % 8)
        path.write_bytes(damaged)
        try:
            assert torch.equal(files.load(path)["state_dict"]["w"], torch.ones(100))
        except UserError:
            refused += 1
    assert refused > 100


def test_the_last_valid_one_is_found_and_said(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        files.save(content(step), tmp_path / files.step_file(step))
    (tmp_path / files.step_file(3)).write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / ".step-000000004.ckpt.tmp").write_bytes(b"unfinished")
    said: list[str] = []
    found = files.last_valid(tmp_path, said.append)
    assert found is not None
    assert found[0].name == files.step_file(2)
    assert len(said) == 2
    assert said[1] == f"Falling back to {files.step_file(2)}."
    assert not list(tmp_path.glob(".*"))
    assert files.last_valid(tmp_path / "none", said.append) is None


def test_what_ckpt_means(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    files.save(content(1.0), folder / files.step_file(1))
    files.link(folder / "last.ckpt", files.step_file(1))
    assert files.resolve(str(tmp_path / "run")).name == "last.ckpt"
    files.link(folder / "best.ckpt", files.step_file(1))
    assert files.resolve(str(tmp_path / "run")).name == "best.ckpt"
    assert files.resolve(str(folder / files.step_file(1))).name == files.step_file(1)


def test_events_are_taken_back_to_a_step(tmp_path: Path) -> None:
    for start, end in ((1, 6), (5, 9)):  # the second session repeats step 5, as after a kill
        writer = SummaryWriter(str(tmp_path))
        for step in range(start, end):
            writer.add_scalar("a", step, step)
        writer.close()
        if start == 1:
            events.keep_until(tmp_path, 4)
            assert scalars(tmp_path)["a"] == [(s, float(s)) for s in range(1, 5)]
    assert [s for s, _ in scalars(tmp_path)["a"]] == list(range(1, 9))
    path = sorted(tmp_path.glob("events.*"))[-1]
    path.write_bytes(path.read_bytes()[:-7])  # a process that was killed while it wrote
    events.keep_until(tmp_path, 7)
    assert [s for s, _ in scalars(tmp_path)["a"]] == list(range(1, 8))
    assert len(list(tmp_path.glob("events.*"))) == 1
    events.keep_until(tmp_path, -1)
    assert not list(tmp_path.iterdir())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    program = (
        "import sys; from pathlib import Path; from lmexp.run.directory import RunDirectory\n"
        "from lmexp.contracts import UserError\n"
        "try:\n"
        "    with RunDirectory(Path(sys.argv[1])).open(): print('in')\n"
        "except UserError as error: print(error)"
    )
    with directory.open():
        done = subprocess.run([sys.executable, "-c", program, str(directory.path)], capture_output=True, text=True)
        assert "is being written by another process" in done.stdout
    done = subprocess.run([sys.executable, "-c", program, str(directory.path)], capture_output=True, text=True)
    assert done.stdout == "in\n"


def test_a_directory_is_removed_if_nothing_came_of_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "logs" / "run")
    with pytest.raises(UserError), directory.open():
        raise UserError("found out late")
    assert not (tmp_path / "logs").exists()


def test_run_ids_do_not_collide() -> None:
    assert len({new_run_id() for _ in range(50)}) == 50


def test_other_errors_of_the_disk_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd"), disk_errors(tmp_path, "x"):
        raise OSError(errno.EBUSY, "odd")
    write_atomically(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


def test_the_record_says_what_ran() -> None:
    found = record()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"]
    assert found["cpu_cores"] == os.cpu_count()


def test_peaks() -> None:
    rate = peak_flops(torch.device("cpu"), bf16=False)
    assert rate is not None
    assert 1e9 < rate < 1e14
    assert peak_flops(torch.device("cpu"), bf16=True) is None
    assert next(iter(PEAK_TFLOPS_BF16)) == "H200"
