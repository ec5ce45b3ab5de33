"""Checkpoints of which every process writes its own part: tensors in pieces, put together when they are read.

The checkpoint itself has a mark in place of each tensor, and is written last, so that it stands only where all pieces
do. Its pieces lie beside it, a file for each process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MARK = {"piece", "shape", "cut"}
"""Keys of what stands in place of a tensor."""


@dataclass
class Piece:
    """What this process has of a tensor."""

    local: Tensor
    """A run of rows of what its group of processes has."""

    shape: tuple[int, ...]
    """Of the whole tensor."""

    cut: tuple[int, tuple[int, ...]] | None
    """How groups share it out: along which dimension, in which spans, of each of which all get the same part; None:
    every group has all of it."""


@dataclass
class Whole:
    """A tensor in pieces that has not been read yet."""

    files: Sequence[Mapping[str, Tensor]]
    """What each process wrote, the groups' members together."""

    name: str
    groups: int
    shape: torch.Size
    cut: tuple[int, tuple[int, ...]] | None

    def to(self, device: Any) -> Tensor:
        """All of it, on a device."""
        n = self.groups
        parts = [torch.cat([held[self.name] for held in self.files[g::n]]) for g in range(1 if self.cut is None else n)]
        if self.cut is None:
            return parts[0].reshape(self.shape).to(device)
        dim, spans = self.cut
        pieces = [part.split([span // n for span in spans], dim) for part in parts]
        return torch.cat([p for of_span in zip(*pieces, strict=True) for p in of_span], dim).to(device)


def piece_file(path: Path, rank: int, world_size: int) -> Path:
    """Where a process writes its part of the checkpoint at `path`."""
    return path.with_name(f"{path.name}.{rank}-of-{world_size}")


def pieces_of(path: Path) -> list[Path]:
    """The files with the pieces of the checkpoint at `path`, as far as they are there."""
    return sorted(path.parent.glob(f"{path.name}.*-of-*"))


def taken_out(node: Any, own: dict[str, Tensor]) -> Any:
    """A checkpoint with marks in place of its pieces, which `own` gets."""

    def mark(piece: Piece) -> dict[str, Any]:
        name = str(len(own))
        # of its own storage: a view would be written with all that it is a view of
        own[name] = piece.local.detach().to("cpu", copy=True).contiguous()
        cut = None if piece.cut is None else [piece.cut[0], list(piece.cut[1])]
        return {"piece": name, "shape": list(piece.shape), "cut": cut}

    return _mapped(node, lambda x: isinstance(x, Piece), mark)


def put_back(node: Any, files: Sequence[Mapping[str, Tensor]], groups: int) -> Any:
    """The checkpoint with `Whole` in place of its marks; `files`: what each process wrote, in order of rank."""

    def found(mark: dict[str, Any]) -> Whole:
        cut = None if mark["cut"] is None else (mark["cut"][0], tuple(mark["cut"][1]))
        return Whole(files, mark["piece"], groups, torch.Size(mark["shape"]), cut)

    return _mapped(node, lambda x: isinstance(x, dict) and x.keys() == _MARK, found)


def read(node: Any) -> Any:
    """The checkpoint with all its tensors read."""
    return _mapped(node, lambda x: isinstance(x, Whole), lambda x: x.to("cpu"))


def _mapped(node: Any, wanted: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    if wanted(node):
        return change(node)
    if isinstance(node, dict):
        return {key: _mapped(value, wanted, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_mapped(value, wanted, change) for value in node]
    return node
