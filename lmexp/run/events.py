"""TensorBoard event files: HPARAMS, and taking back what was logged after the step a run goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmexp.run.directory import disk_errors

SESSION_END = "_hparams_/session_end_info"
"""Tag of the record that closes a run in HPARAMS; a run that goes on is not closed."""


def read(path: Path) -> Iterator[tuple[bytes, object]]:
    """Records of an event file as (bytes, `Event`), up to the first that is cut off."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    # a process that was killed leaves its last record cut off; the loader ends there
    for record in RawEventFileLoader(str(path)).Load():
        yield record, Event.FromString(record)


def keep_until(directory: Path, step: int) -> None:
    """Make the event files of a directory hold only what belongs to the first `step` optimizer steps.

    All files become one, written before the others are removed. `step` < 0 removes everything. Without this, the
    steps between the last checkpoint and the moment a run was killed would stand in TensorBoard twice.
    """
    from tensorboard.summary.writer.record_writer import RecordWriter

    files = sorted(directory.glob("events.out.tfevents.*"))
    if not files:
        return
    seen: set[bytes] = set()  # killed between the two steps below, a call leaves records in two files
    # the merged file takes the oldest name, which readers sort first
    merged = directory / f".{files[0].name}.tmp"
    with disk_errors(directory, "Rewriting TensorBoard's event files"):
        with open(merged, "wb") as file:
            writer = RecordWriter(file)
            for number, path in enumerate(files):
                for record, event in read(path):
                    first_of_others = event.HasField("file_version") and number > 0  # type: ignore[attr-defined]
                    if not first_of_others and _belongs(event, step) and record not in seen:
                        seen.add(record)
                        writer.write(record)
            file.flush()
            os.fsync(file.fileno())
        os.replace(merged, files[0])
        for path in files[1:]:
            path.unlink()
        if step < 0:
            files[0].unlink()


def _belongs(event: object, step: int) -> bool:
    if event.HasField("file_version"):  # type: ignore[attr-defined]
        return True
    tags = [value.tag for value in event.summary.value]  # type: ignore[attr-defined]
    tested = any(tag.startswith("test/") for tag in tags)  # the test split is scored again at the end
    return event.step <= step and SESSION_END not in tags and not tested  # type: ignore[attr-defined]


def add_scalars(writer: Any, values: Mapping[str, float], step: int) -> None:
    """Write numbers of one step as one record. `writer` is a `SummaryWriter`."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    records = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
    writer.file_writer.add_summary(Summary(value=records), step)


def start_hparams(writer: Any, hparams: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Open a run in HPARAMS: its parameters, and the tags whose latest scalars are its metrics.

    `writer` is a `SummaryWriter`. The metrics must be named here: TensorBoard reads the first such record only.
    """
    from torch.utils.tensorboard.summary import hparams as summaries

    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in hparams.items()}
    experiment, start, _ = summaries(plain, dict.fromkeys(metrics, 0))
    writer.file_writer.add_summary(experiment)
    writer.file_writer.add_summary(start)


def end_hparams(writer: Any) -> None:
    """Close a run in HPARAMS as finished."""
    from torch.utils.tensorboard.summary import hparams as summaries

    writer.file_writer.add_summary(summaries({}, {})[2])
