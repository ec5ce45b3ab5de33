"""Checkpoint files: written whole or not at all, verified when read, free of pickled objects of ours.

A checkpoint is what `torch.save` writes (a zip file, a CRC-32 for each record) of plain containers and tensors.
Every file is named by its step; `last.ckpt` and `best.ckpt` are symbolic links to two of them.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmexp.contracts import UserError
from lmexp.run.directory import disk_errors
from lmexp.run.pieces import piece_file, pieces_of, put_back, read

FORMAT = 1
"""Version of the `lmexp` entry of a checkpoint."""

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    struct.error,
)
"""What reading a damaged zip file can raise, after the byte that is wrong."""

_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")


class NewerFormat(UserError):
    """A checkpoint that is whole, but not for this version."""


def step_file(step: int) -> str:
    """The file name of the checkpoint taken after `step` optimizer steps."""
    return f"step-{step:09d}.ckpt"


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that stand in a directory, ascending; nothing is read."""
    found = (_STEP_FILE.fullmatch(p.name) for p in directory.glob("step-*.ckpt"))
    return sorted(int(m.group(1)) for m in found if m)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint beside its place, bring it to the disk, then move it there in one step.

    Raises `UserError` for a full disk or a missing permission; then the file that stood at `path` is untouched
    and no partial file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path, "Saving a checkpoint"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # through a file of our own: the C++ writer that a path would use reports a full disk as RuntimeError
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):  # torch wraps what the file raised
                cause = cause.__cause__ or cause.__context__
            if cause is not None and cause is not error:
                raise cause from None
            raise


def remove(path: Path) -> None:
    """Delete a checkpoint, the file that makes it one first."""
    path.unlink()
    for piece in pieces_of(path):
        piece.unlink(missing_ok=True)


def link(name: Path, target: str) -> None:
    """Point the symbolic link `name` to the sibling file `target`, replacing an older link in one step."""
    with disk_errors(name, "Linking a checkpoint"):
        temporary = name.with_name(f".{name.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, name)


def load(path: Path | str, whole: bool = True) -> dict[str, Any]:
    """Read and verify a checkpoint of a run; not `whole`: tensors in pieces (`run/pieces.py`) only when they are asked
    for.

    Raises `UserError` if the file is missing, truncated or altered (a record's CRC-32 differs), no checkpoint at
    all, holds pickled objects other than tensors and plain containers, or was not written by lmexp.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"Checkpoint {path} does not exist. Give ckpt= a run's directory or a file in its checkpoints/."
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"Checkpoint {path} cannot be read: {error.strerror}. Give one that you may read.") from error
    if start != b"PK\x03\x04":
        raise UserError(f"{path} is not a checkpoint: it does not begin as the zip file that torch.save writes.")
    _refuse_damage(path, path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Checkpoint {path} holds a pickled object ({_refused_object(error)}), which could run code when it is "
            "loaded; only tensors and plain containers are read. Save its weights alone and use that file."
        ) from None
    except (*_DAMAGE, KeyError) as error:
        raise UserError(f"{path} is not a checkpoint that torch.load can read ({error}).") from None
    if not isinstance(checkpoint, dict) or "lmexp" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(
            f"{path} is a torch file, but not a checkpoint of lmexp (no entries 'state_dict' and 'lmexp'). "
            "Give ckpt= a run's directory or a file in its checkpoints/."
        )
    if checkpoint["lmexp"]["format"] > FORMAT:
        raise NewerFormat(f"Checkpoint {path} was written by a newer lmexp; this one reads format {FORMAT} at most.")
    if "pieces" not in checkpoint:
        return checkpoint
    in_pieces = checkpoint.pop("pieces")
    at = path.resolve()  # best.ckpt and last.ckpt are links
    written = [piece_file(at, rank, in_pieces["processes"]) for rank in range(in_pieces["processes"])]
    held = []
    for file_ in written:
        if not file_.is_file():
            raise UserError(
                f"Checkpoint {path} is in pieces, and {file_.name} is not beside it. Keep the files of a checkpoint "
                "together, or use another one of the same run's checkpoints/."
            )
        _refuse_damage(file_, path)
        held.append(_tensors(file_, path, in_pieces["id"]))
    checkpoint = put_back(checkpoint, held, in_pieces["groups"])
    return read(checkpoint) if whole else checkpoint


def _tensors(file: Path, checkpoint: Path, of: str) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        known, tensors = content["of"], content["tensors"]
    except (pickle.UnpicklingError, *_DAMAGE, KeyError, TypeError) as error:
        raise UserError(f"Checkpoint {checkpoint} is in pieces, and {file.name} is none of them ({error}).") from None
    if known != of:
        raise UserError(
            f"Checkpoint {checkpoint} is in pieces, and {file.name} is of another one. Keep the files of a checkpoint "
            "together, or use another one of the same run's checkpoints/."
        )
    return tensors


def load_model(path: Path | str) -> dict[str, Any]:
    """The same without the optimizer's state, which is not read where it is in pieces."""
    checkpoint: dict[str, Any] = load(path, whole=False)
    return read({key: value for key, value in checkpoint.items() if key != "optimizer_states"})


def _refuse_damage(file: Path, checkpoint: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except _DAMAGE:
        broken = "its directory"
    if broken is not None:
        where = "" if file == checkpoint else f" of {file.name}"
        raise UserError(
            f"Checkpoint {checkpoint} is damaged: {broken}{where} cannot be read (the file was cut off or altered). "
            "Use another one of the same run's checkpoints/."
        )


def _refused_object(error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"(?:class|function) ([\w.]+)", str(error))
    return named.group(1) if named else "of a kind that is not allowed"


def link_last_and_best(directory: Path, last: int, best: int | None) -> None:
    """Make `last.ckpt` and `best.ckpt` point to the files of these steps, as far as they are there."""
    link(directory / "last.ckpt", step_file(last))
    if best is not None and (directory / step_file(best)).exists():
        link(directory / "best.ckpt", step_file(best))


def resolve(ckpt: str) -> Path:
    """The checkpoint file that `ckpt=` means: a file, or a run's directory, whose best (else last) one is meant."""
    path = Path(ckpt)
    if path.is_dir():
        for candidate in (path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"):
            if candidate.exists():
                return candidate
            if candidate.is_symlink():
                raise UserError(f"{candidate} points to a file that is gone; give ckpt= one that is there.")
        raise UserError(f"ckpt={ckpt} is a directory without checkpoints/last.ckpt; expected a run's directory.")
    if not path.exists():
        raise UserError(f"ckpt={ckpt} does not exist; expected a run's directory or a checkpoint file.")
    return path


def last_valid(directory: Path, say: Callable[[str], None], tidy: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a directory that can be read, with its content; None if there is none at all.

    A damaged one is passed over and `say` is told. With `tidy` (one process does it) the damaged are renamed, so that
    they are not counted any more, and unfinished temporary files are removed. Raises `UserError` if there are
    checkpoints but none can be read, or if one was written by a newer lmexp: nothing is begun anew over them.
    """
    if tidy:
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for piece in directory.glob("step-*.ckpt.*-of-*"):  # of one that was not finished
            if not piece.with_suffix("").exists():
                piece.unlink()
    damaged = []
    for step in reversed(saved_steps(directory)):
        path = directory / step_file(step)
        try:
            content = load(path, whole=False)
        except NewerFormat:
            raise
        except UserError as error:
            say(str(error))
            damaged.append(path)
            continue
        if damaged:
            say(f"Falling back to {path.name}.")
        for bad in damaged if tidy else ():
            for piece in pieces_of(bad):
                piece.rename(piece.with_name(f"{bad.stem}.damaged{piece.suffix}"))
            bad.rename(bad.with_suffix(".damaged"))
        return path, content
    if damaged:
        raise UserError(
            f"None of the checkpoints in {directory} can be read, so there is nothing to go on from. Start a new "
            "run in another paths.run_dir, or bring back a good copy."
        )
    return None


def _sync_directory(directory: Path) -> None:
    """Bring a rename to the disk, so that it survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
