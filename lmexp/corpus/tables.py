"""Local files of rows, csv, tsv, jsonl and Parquet, plain or gzipped: what is wrong with one is told at once."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from lmexp.contracts import UserError
from lmexp.corpus.parts import did_you_mean, listed

Paths = str | Sequence[str] | None
"""A file, a glob or a list of these."""

Kind = Literal["jsonl", "csv", "tsv", "parquet"]

KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
"""The endings that tables have; `.gz` may follow."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMED = 10  # rows that an error names


def kind_of(path: Path) -> Kind | None:
    """What the ending says; None: no table."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return KINDS.get(suffixes[-1]) if suffixes else None


def unit_of(path: Path) -> str:
    """What `table_rows` numbers in it: `line`, counted from 1, or `row`, counted from 0."""
    return "row" if kind_of(path) == "parquet" else "line"


def found(paths: Paths, name: str) -> list[Path]:
    """The files that paths and globs name: in the order given, those of a glob sorted."""
    files = []
    for pattern in [paths] if isinstance(paths, str) else list(paths or ()):
        expanded = Path(pattern).expanduser()
        matches = (
            [expanded] if expanded.is_file() else [Path(p) for p in sorted(glob.glob(str(expanded), recursive=True))]
        )
        matches = [path for path in matches if path.is_file()]
        if not matches:
            raise UserError(f"corpus.{name}={pattern}: there is no such file; give one, or a glob that matches some.")
        files += matches
    return files


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, unpacked; what is wrong with it, also while it is read, is a `UserError` that names it."""
    try:
        with gzip.open(path, "rb") if _zipped(path) else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {_not_utf8(path)} ({error.reason}); expected text in UTF-8. Convert it, for example "
            "with iconv -f latin1 -t utf-8."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged or cut off ({error}); expected a whole gzip file. Copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}. Give a path that can be read.") from error


@contextmanager
def opened_text(path: Path, newline: str | None) -> Iterator[IO[str]]:
    """The same as text in UTF-8; `newline` is that of `open`."""
    with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file:
        yield file


class BrokenRows:
    """The rows of a source that cannot be used, collected to be told in one error."""

    def __init__(self, source: str, unit: str = "line") -> None:
        self._source = source
        self._unit = unit
        self._numbers: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}
        self._fixes: dict[str, None] = {}
        self._unnamed = 0

    def add(self, number: int, what: str, fix: str) -> None:
        """Line or row `number` has `what` wrong with it, and `fix` mends it; a sentence each, `what` without a stop."""
        room = sum(map(len, self._numbers.values())) < _NAMED
        if not room and what not in self._counts:
            self._unnamed += 1
            return
        self._counts[what] = self._counts.get(what, 0) + 1
        self._fixes[fix] = None
        if room:
            self._numbers.setdefault(what, []).append(number)

    def check(self) -> None:
        """Raise `UserError` if there are some."""
        if not self._counts:
            return
        told = "; ".join(f"{listed(self._unit, self._numbers[what], n)}: {what}" for what, n in self._counts.items())
        more = f"; and {self._unnamed} more" if self._unnamed else ""
        counted = " Rows are counted from 0." if self._unit == "row" else ""
        raise UserError(f"{self._source}, {told}{more}. {' '.join(self._fixes)}{counted}")


def short(name: str) -> str:
    """The name in quotes, cut if it is long: it may be a text that stands where a name should."""
    return repr(name if len(name) <= 40 else f"{name[:40]}...")


def check_columns(source: object, wanted: Sequence[str], there: Collection[str], fix: str) -> None:
    """Raise `UserError` that names all columns of `wanted` that are not `there`, with what may have been meant."""
    missing = [name for name in wanted if name not in there]
    if missing:
        columns = list(there)
        has = ", ".join(map(short, columns[:20])) or "none"
        more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
        close = "".join(dict.fromkeys(did_you_mean(name, columns) for name in missing))
        raise UserError(
            f"{source} has no column {' and no '.join(map(repr, missing))}; it has {has}{more}.{close} {fix}"
        )


def table_rows(
    path: Path,
    columns: Sequence[str],
    fix: str,
    *,
    names: Sequence[str] | None = None,
    quoted: bool | None = None,
    within: str | None = None,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, column -> value) of each row that has any: the line it starts at, from 1, or in Parquet the row, from 0.

    Values are texts in csv and tsv, whatever they are in jsonl and Parquet; a column may be missing in some rows of
    jsonl, not in all. Raises `UserError`, with `fix`, if one of `columns` is missing, and after the last row for all
    rows that cannot be read, so that what was read until then is not to be used.

    `names`: of the columns of csv and tsv, where no line of the file says them. `quoted`: whether cells may stand in
    quotes; None: those of csv; in tsv quotes are part of the text. `within`: rows may be one object in this column.
    """
    kind = kind_of(path)
    assert kind is not None, "callers check what they read"
    if kind == "parquet":
        yield from _parquet_rows(path, columns, fix, within)
        return
    broken = BrokenRows(str(path))
    with opened_text(path, newline="") as file:
        if kind == "jsonl":
            yield from _json_rows(path, file, columns, fix, within, broken)
        else:
            cells = _cells(file, kind, quoted, broken)
            yield from _named_rows(path, cells, columns, fix, names, broken)
    broken.check()


def _cells(file: IO[str], kind: Kind, quoted: bool | None, broken: BrokenRows) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each row that is not blank."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KB is shorter than documents
    reader = csv.reader(
        file,
        delimiter="," if kind == "csv" else "\t",
        quoting=csv.QUOTE_MINIMAL if (kind == "csv" if quoted is None else quoted) else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            broken.add(
                line,
                str(error),
                "Expected quotes around whole cells, doubled inside. If quotes are part of the text, say "
                "data.corpus.quoted=false.",
            )
            continue
        if cells:
            yield line, cells


def _named_rows(
    path: Path,
    cells: Iterator[tuple[int, list[str]]],
    columns: Sequence[str],
    fix: str,
    names: Sequence[str] | None,
    broken: BrokenRows,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    by = "the first line has" if names is None else "data.corpus.columns names"
    if names is None:
        _, names = next(cells, (1, []))
        broken.check()  # were the first line skipped, a row of texts would be the names
    check_columns(path, columns, names, fix)
    for name in columns:
        if list(names).count(name) > 1:
            raise UserError(f"{path} has {list(names).count(name)} columns {name!r}; expected one. Rename the others.")
    for line, row in cells:
        if len(row) == len(names):
            yield line, dict(zip(names, row, strict=True))
        else:
            cells_ = f"{len(row)} cell{'s' if len(row) > 1 else ''}"
            broken.add(
                line,
                f"{cells_}, where {by} {len(names)}",
                "Expected as many everywhere. If cells are quoted, say data.corpus.quoted=true.",
            )


def _json_rows(
    path: Path, file: IO[str], columns: Sequence[str], fix: str, within: str | None, broken: BrokenRows
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    seen: dict[str, None] = {}
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if _SURROGATE.search(line):
                json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            what = f"not JSON ({error.msg} at character {error.pos + 1})"
            broken.add(number, what, "Expected an object on each line.")
            continue
        except UnicodeEncodeError:
            broken.add(number, "half of a surrogate pair", "Expected whole characters; replace it, say by \\ufffd.")
            continue
        if isinstance(row, dict) and isinstance(row.get(within), dict):
            row = row[within]
        if not isinstance(row, dict):
            broken.add(number, f"{type(row).__name__} in place of an object", "Expected an object on each line.")
            continue
        seen.update(dict.fromkeys(row))
        yield number, row
    broken.check()
    check_columns(path, columns, seen, fix)


def _parquet_rows(
    path: Path, columns: Sequence[str], fix: str, within: str | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    with opened(path) as raw:
        try:
            file = parquet.ParquetFile(io.BytesIO(raw.read()) if _zipped(path) else raw)
            schema = file.schema_arrow
            inner = within is not None and within in schema.names and pyarrow.types.is_struct(schema.field(within).type)
            there = [field.name for field in schema.field(within).type] if inner else schema.names
            check_columns(path, columns, there, fix)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[within] if inner else list(columns)):
                for row in batch.to_pylist():
                    yield number, (row[within] or {}) if inner else row
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{path} is damaged or cut off ({error}); expected a whole Parquet file. Copy it again."
            ) from error


def _zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _not_utf8(path: Path) -> str:
    """The lines that are not."""
    numbers = []
    with opened(path) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                numbers.append(number)
    return listed("line", numbers[:_NAMED], len(numbers))
