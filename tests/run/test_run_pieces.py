"""Checkpoints in pieces: written by several, read as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.run import checkpoint as files
from lmexp.run.pieces import Piece, Whole, piece_file, pieces_of, taken_out

GROUPS, COPIES = 2, 3
WEIGHT = torch.arange(24 * 5, dtype=torch.float32).view(24, 5)
BIAS = torch.arange(7.0)
SPANS = (12, 8, 4)


def write(path: Path, of: str = "a") -> None:
    """As `COPIES` x `GROUPS` processes would: rows by hand, each span's halves to the two members of a group."""
    for rank in range(GROUPS * COPIES):
        copy, member = divmod(rank, GROUPS)
        starts = (0, 12, 20)
        rows = [WEIGHT[s + member * n // 2 : s + (member + 1) * n // 2] for s, n in zip(starts, SPANS, strict=True)]
        mine = torch.cat(rows)[copy * 4 : (copy + 1) * 4]  # 12 rows over three copies
        columns = WEIGHT[:, :4][copy * 8 : (copy + 1) * 8, member * 2 : member * 2 + 2]
        content: dict[str, Any] = {
            "lmexp": {"format": files.FORMAT, "step": 3},
            "state_dict": {
                "weight": Piece(mine, (24, 5), (0, SPANS)),
                "inputs": Piece(columns, (24, 4), (1, (4,))),
                "bias": Piece(BIAS[copy * 3 : copy * 3 + 3], (7,), None),
                "plain": torch.ones(2),
            },
            "optimizer_states": [{"state": {0: {"momentum": Piece(mine * 2, (24, 5), (0, SPANS)), "step": 1.0}}}],
        }
        own: dict[str, torch.Tensor] = {}
        marked = taken_out(content, own)
        files.save({"of": of, "tensors": own}, piece_file(path, rank, GROUPS * COPIES))
        if rank == 0:
            main = {**marked, "pieces": {"processes": GROUPS * COPIES, "groups": GROUPS, "id": of}}
    files.save(main, path)


def test_pieces_are_put_together(tmp_path: Path) -> None:
    path = tmp_path / files.step_file(3)
    write(path)
    files.link_last_and_best(tmp_path, 3, 3)
    for name in (path, tmp_path / "best.ckpt"):
        found = files.load(name)
        assert torch.equal(found["state_dict"]["weight"], WEIGHT)
        assert torch.equal(found["state_dict"]["inputs"], WEIGHT[:, :4])
        assert torch.equal(found["state_dict"]["bias"], BIAS)
        assert torch.equal(found["optimizer_states"][0]["state"][0]["momentum"], WEIGHT * 2)
        assert "pieces" not in found
    unread = files.load(path, whole=False)["state_dict"]["weight"]
    assert isinstance(unread, Whole)
    assert unread.shape == WEIGHT.shape


def test_a_missing_or_damaged_piece_is_named(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        write(tmp_path / files.step_file(step))
    piece_file(tmp_path / files.step_file(5), 4, 6).unlink()
    bad = piece_file(tmp_path / files.step_file(4), 1, 6)
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"step-000000005\.ckpt\.4-of-6 is not beside it"):
        files.load(tmp_path / files.step_file(5))
    with pytest.raises(UserError, match=r"of step-000000004\.ckpt\.1-of-6 cannot be read"):
        files.load(tmp_path / files.step_file(4))
    write(tmp_path / "other.ckpt", of="b")
    write(tmp_path / files.step_file(6))
    piece_file(tmp_path / "other.ckpt", 2, 6).rename(piece_file(tmp_path / files.step_file(6), 2, 6))
    with pytest.raises(UserError, match=r"step-000000006\.ckpt\.2-of-6 is of another one"):
        files.load(tmp_path / files.step_file(6))
    told: list[str] = []
    found = files.last_valid(tmp_path, told.append)
    assert found is not None
    assert found[0].name == files.step_file(3)
    assert len(told) == 4
    assert files.last_valid(tmp_path, told.append) is not None
    for step, left in ((5, 5), (4, 6), (6, 6)):  # what is left of them stays
        assert len(list(tmp_path.glob(f"step-{step:09d}.damaged.*-of-6"))) == left


def test_pieces_go_with_their_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / files.step_file(3)
    write(path)
    files.save({}, piece_file(tmp_path / files.step_file(9), 0, 2))  # of one that was never finished
    files.last_valid(tmp_path, lambda _: None)
    assert len(pieces_of(path)) == 6
    assert not pieces_of(tmp_path / files.step_file(9))
    files.remove(path)
    assert not list(tmp_path.glob("step-*"))
