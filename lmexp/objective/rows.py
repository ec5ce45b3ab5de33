"""From texts of any length to rows of one length: several in a row where they fit, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmexp.contracts import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Piece:
    """A text of which some places are scored."""

    tokens: np.ndarray
    """(n,) int64, as the model reads them."""

    scored: np.ndarray
    """(k,) int64, places in the text."""

    labels: np.ndarray
    """(k,) int64, the true tokens there."""

    n_bytes: float
    """UTF-8 bytes that the labels stand for."""

    part: int = 0
    """The part of the corpus."""

    documents: np.ndarray | None = None
    """(n,) int64 if the piece itself holds several texts."""

    positions: np.ndarray | None = None
    """(n,) int64 if they are not 0, 1, ..."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Further inputs, (n,) int64 each; every piece of a batch has the same."""


def first_fit(
    lengths: Sequence[int] | Sequence[tuple[int, int]], length: int, target_length: int | None = None
) -> list[list[int]]:
    """Which of the texts go into each row: every one into the first row with room, in order; empty ones nowhere.

    Texts of two lengths have a source and a target, for which a row has room each: `length` and `target_length`, which
    is `length` unless given.
    """
    if not lengths:
        return []
    sizes = np.array(lengths, dtype=np.int64).reshape(len(lengths), -1)  # (texts, 1 or 2)
    whole = np.array([length, length if target_length is None else target_length])[: sizes.shape[1]]
    assert (sizes <= whole).all()
    rows: list[list[int]] = []
    room = np.tile(whole, (len(sizes), 1))  # of each row; there are at most as many rows as texts
    for number, size in enumerate(sizes):
        if not size.any():
            continue
        row = int((room[: len(rows)] >= size).all(1).argmax()) if rows else 0
        if not rows or (room[row] < size).any():
            rows.append([])
            row = len(rows) - 1
        rows[row].append(number)
        room[row] -= size
    return rows


def masked_batch(rows: Sequence[Sequence[Piece]], length: int, most_scored: int, names: Sequence[str] = ()) -> Batch:
    """Rows of pieces as a batch with `scored` (B, K), K at least `most_scored`; at least one row.

    `names` are the further inputs. Documents and positions are given where a row is not one whole text.
    """
    n_rows = max(1, len(rows))
    width = max([most_scored, *(sum(len(piece.labels) for piece in row) for row in rows)])
    tokens = np.zeros((n_rows, length), dtype=np.int64)
    documents = np.full((n_rows, length), -1, dtype=np.int64)
    positions = np.zeros((n_rows, length), dtype=np.int64)
    columns = {name: np.zeros((n_rows, length), dtype=np.int64) for name in names}
    scored = np.zeros((n_rows, width), dtype=np.int64)
    labels = np.full((n_rows, width), IGNORE_INDEX, dtype=np.int64)
    parts = np.zeros((n_rows, width), dtype=np.int64)
    n_bytes = np.zeros(n_rows)
    whole = len(rows) > 0
    for r, row in enumerate(rows):
        at = used = number = 0
        for piece in row:
            n, k = len(piece.tokens), len(piece.labels)
            here, there = slice(at, at + n), slice(used, used + k)
            tokens[r, here] = piece.tokens
            documents[r, here] = number if piece.documents is None else number + piece.documents
            positions[r, here] = np.arange(n) if piece.positions is None else piece.positions
            for name, values in piece.columns.items():
                columns[name][r, here] = values
            scored[r, there] = at + piece.scored
            labels[r, there] = piece.labels
            parts[r, there] = piece.part
            n_bytes[r] += piece.n_bytes
            whole &= piece.documents is None and piece.positions is None
            at, used = at + n, used + k
            number = int(documents[r, at - 1]) + 1 if n else number
        whole &= len(row) == 1 and at == length
    inputs = {"tokens": tokens, **columns}
    if not whole:
        inputs |= {"documents": documents, "positions": positions}
    return {
        "inputs": {name: torch.from_numpy(value) for name, value in inputs.items()},
        "labels": torch.from_numpy(labels),
        "n_bytes": torch.from_numpy(n_bytes.round().astype(np.int64)),
        "scored": torch.from_numpy(scored),
        "parts": torch.from_numpy(parts),
    }


def sequence_batch(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    n_bytes: Sequence[float],
    parts: Sequence[int],
    start_id: int,
    source_length: int,
    target_length: int,
) -> Batch:
    """For an encoder-decoder: sources (n,) to read and targets (m,) to write, padded at the right to the lengths.

    The decoder reads `start_id` and its targets but for the last. Padding is document -1, told where there is any.
    """
    tokens, documents = _padded(sources, source_length)
    labels, written = _padded(targets, target_length)
    read = np.roll(labels, 1, axis=1)
    read[:, 0] = start_id
    labels[written < 0] = IGNORE_INDEX
    inputs = {"tokens": tokens, "decoder_tokens": read}
    if (documents < 0).any() or (written < 0).any():
        columns = np.broadcast_to(np.arange(source_length), documents.shape)
        decoder_columns = np.broadcast_to(np.arange(target_length), written.shape)
        inputs |= {"documents": documents, "positions": columns.copy()}
        inputs |= {"decoder_documents": written, "decoder_positions": decoder_columns.copy()}
    batch: Batch = {
        "inputs": {name: torch.from_numpy(value) for name, value in inputs.items()},
        "labels": torch.from_numpy(labels),
        "n_bytes": torch.from_numpy(np.array(n_bytes).round().astype(np.int64)),
    }
    if any(parts):
        batch["parts"] = _each_label(parts, target_length)
    return batch


@dataclass(frozen=True)
class Pair:
    """A text to read and the one to write for it."""

    source: np.ndarray
    """(n,) int64, with its end."""

    target: np.ndarray
    """(m,) int64, with its end."""

    n_bytes: float
    """UTF-8 bytes of the target."""

    part: int = 0
    """The part of the corpus."""


def paired_batch(rows: Sequence[Sequence[Pair]], length: int, start_id: int) -> Batch:
    """Rows of pairs for an encoder-decoder, at most `length` tokens on either side; at least one row. Where targets
    are short, as summaries are, so is the decoder's side.

    The decoder reads, for each pair, `start_id` and its target but for the last; it sees the source of its own pair.
    """
    shape = (max(1, len(rows)), length)
    sides = {name: np.zeros(shape, dtype=np.int64) for name in ("tokens", "positions")}
    sides |= {f"decoder_{name}": np.zeros(shape, dtype=np.int64) for name in ("tokens", "positions")}
    sides |= {f"{name}documents": np.full(shape, -1, dtype=np.int64) for name in ("", "decoder_")}
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    parts = np.zeros(shape, dtype=np.int64)
    n_bytes = np.zeros(shape[0])
    read = written = 1
    for r, row in enumerate(rows):
        at = out = 0
        for number, pair in enumerate(row):
            n, m = len(pair.source), len(pair.target)
            here, there = slice(at, at + n), slice(out, out + m)
            sides["tokens"][r, here] = pair.source
            sides["decoder_tokens"][r, there] = np.concatenate(([start_id], pair.target[:-1]))
            for prefix, place, size in (("", here, n), ("decoder_", there, m)):
                sides[f"{prefix}documents"][r, place] = number
                sides[f"{prefix}positions"][r, place] = np.arange(size)
            labels[r, there] = pair.target
            parts[r, there] = pair.part
            n_bytes[r] += pair.n_bytes
            at, out = at + n, out + m
        read, written = max(read, at), max(written, out)
    widths = {"": rounded_up(read, length, _WIDTHS), "decoder_": rounded_up(written, length, _WIDTHS)}
    inputs = {
        name: value[:, : widths["decoder_" if name.startswith("decoder_") else ""]] for name, value in sides.items()
    }
    return {
        "inputs": {name: torch.from_numpy(value.copy()) for name, value in inputs.items()},
        "labels": torch.from_numpy(labels[:, : widths["decoder_"]].copy()),
        "n_bytes": torch.from_numpy(n_bytes.round().astype(np.int64)),
        "parts": torch.from_numpy(parts[:, : widths["decoder_"]].copy()),
    }


_WIDTHS = 32
"""Widths of rows of pairs are multiples of this, so that a compiled model meets few shapes."""


def _padded(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, length) tokens, 0 where there are none, and documents: 0, and -1 for padding."""
    tokens = np.zeros((len(texts), length), dtype=np.int64)
    documents = np.full((len(texts), length), -1, dtype=np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        documents[row, : len(text)] = 0
    return tokens, documents


def _each_label(parts: Sequence[int], width: int) -> Tensor:
    return torch.tensor(parts, dtype=torch.int64)[:, None].expand(-1, width).contiguous()


def rounded_up(length: int, most: int, unit: int = 16) -> int:
    """`length` to the next multiple, so that shapes are few; at least one unit, at most `most`."""
    return min(most, max(unit, -(-length // unit) * unit))
