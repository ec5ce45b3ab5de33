"""Hashes: of files' contents, remembered so that large files are read once, and of names, which decide the split."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmexp.contracts import Split, UserError

_INDEX = "fingerprints.json"


def content_hash(paths: Sequence[Path], cache_dir: str | Path | None) -> str:
    """sha256 over the contents of the files in this order; their names do not matter.

    With a `cache_dir`, a file whose path, size and time of change are known there is not read again.
    """
    index_path = None if cache_dir is None else Path(cache_dir) / _INDEX
    index = _read(index_path)
    digest = hashlib.sha256()
    changed = False
    for path in paths:
        key = str(path.resolve())
        try:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            known = index.get(key)
            if known is None or known[:2] != stamp:
                index[key] = known = [*stamp, _sha256(path)]
                changed = True
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror}. Give a path that can be read.") from error
        digest.update(known[2].encode())
    if changed and index_path is not None:
        write_json(index_path, index)
    return digest.hexdigest()


def splits_of(validation: float, test: float) -> tuple[Split, ...]:
    """The splits of a corpus that is cut by these fractions."""
    splits: list[Split] = ["train"]
    if validation > 0:
        splits.append("validation")
    if test > 0:
        splits.append("test")
    return tuple(splits)


def split_of(name: str, validation: float, test: float) -> Split:
    """Where the hash of a name, or of a text, sends it: about these fractions of all go to validation and test."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path | None) -> dict[str, list]:
    try:
        return {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it only saves time


def write_json(path: Path, content: Any) -> None:
    """Write a file of the cache whole or not at all; `UserError` if that fails."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content, indent=0), encoding="utf-8")
        os.replace(unfinished, path)  # of two at once the last wins; what the other found is found again
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Free some space there, or put the cache elsewhere with "
            "data.cache_dir=FOLDER."
        ) from error
