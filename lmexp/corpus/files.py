"""Local files as a corpus: text, JSON lines, tables and Parquet, plain or gzipped."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import content_hash, split_of
from lmexp.corpus.tables import Paths, check_columns, found, kind_of, opened_text, table_rows

if TYPE_CHECKING:
    from datasets import Dataset

Unit = Literal["file", "line", "paragraph", "row"]

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_FIX = "Choose one of them with data.corpus.field=NAME."


@dataclass
class Files:
    """Documents from local files, whose kind is told by their ending; any other ending is text in UTF-8.

    Either `path` is cut into splits, or `train`, `validation` and `test` name the files of each.
    """

    path: Paths = None
    """A file, a glob or a list of these, to be cut into splits."""

    train: Paths = None
    """Files, globs or a list of these: the training split. Not with `path`."""

    validation: Paths = None
    """The same for the validation split. Not with `path`."""

    test: Paths = None
    """The same for the test split. Not with `path`."""

    unit: Unit | None = None
    """A document is a `file`, `line`, `paragraph` (blank lines part them) or `row`; None: a row of tables (jsonl,
    csv, tsv, parquet), else a file."""

    field: str = "text"
    """The column of tables that holds the text."""

    by: Literal["hash", "tail"] = "hash"
    """How `path` is cut: `hash` sends each document by its content, equal ones to the same split; `tail` takes the
    last characters for validation, then test, as is customary for tinyshakespeare."""

    validation_fraction: float = 0.05
    """Of the documents, or with `tail` of the characters, for validation; in [0, 1)."""

    test_fraction: float = 0.0
    """The same for test; in [0, 1), below 1 with `validation_fraction`."""

    cache_dir: str | None = None
    """Where content hashes and rows are kept; None: hashes are not kept, rows in the cache of `datasets`."""

    streaming = False

    def __post_init__(self) -> None:
        explicit = [name for name in _SPLITS if getattr(self, name)]
        if not self.path and "train" not in explicit:
            raise UserError(
                "corpus.path is not given; expected a file, a glob or a list of these: data.corpus.path=FILE, or "
                "data.corpus.train=FILE data.corpus.validation=FILE for splits that stand in files of their own."
            )
        if self.path and explicit:
            raise UserError(f"corpus.path and corpus.{explicit[0]} exclude each other; set one of them to null.")
        if self.unit not in (None, "file", "line", "paragraph", "row"):
            raise UserError(f"corpus.unit={self.unit!r}; expected file, line, paragraph, row or null.")
        if self.by not in ("hash", "tail"):
            raise UserError(f"corpus.by={self.by!r}; expected hash or tail.")
        if min(self.validation_fraction, self.test_fraction) < 0 or self.validation_fraction + self.test_fraction >= 1:
            raise UserError(
                f"corpus.validation_fraction={self.validation_fraction} and corpus.test_fraction={self.test_fraction}: "
                "expected fractions from 0 on that leave something to train on, for example 0.05 and 0."
            )

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are."""
        if not self.path:
            return tuple(name for name in _SPLITS if getattr(self, name))
        share = {"train": 1.0, "validation": self.validation_fraction, "test": self.test_fraction}
        return tuple(name for name in _SPLITS if share[name] > 0)

    def fingerprint(self) -> str:
        """sha256 of the files' contents and of how they are read; a file that did not change is not read again."""
        parts: list[Any] = [self.unit, self.field]
        if self.path:
            files = found(self.path, "path")
            cut = [self.by, self.validation_fraction, self.test_fraction]
            parts += [*cut, [_kind(p) for p in files], content_hash(files, self.cache_dir)]
        else:
            for split in self.splits:
                files = found(getattr(self, split), split)
                parts += [split, [_kind(p) for p in files], content_hash(files, self.cache_dir)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def rows(self, split: Split) -> Dataset:
        """The documents of a split, in the order of the files."""
        from datasets import Dataset, Features, Value
        from datasets.exceptions import DatasetGenerationError

        if split not in self.splits:
            fix = f"corpus.{split}_fraction=0.05" if self.path and split != "train" else f"corpus.{split}=FILE"
            raise UserError(f"These files have no {split} split, only {', '.join(self.splits)}; set data.{fix}.")
        try:
            return Dataset.from_generator(
                self._rows,
                gen_kwargs={"split": split},
                features=Features({"text": Value("large_string")}),
                cache_dir=None if self.cache_dir is None else str(Path(self.cache_dir) / "datasets"),
                fingerprint=hashlib.sha256(f"{self.fingerprint()} {split}".encode()).hexdigest()[:32],
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None

    def _rows(self, split: Split) -> Iterator[dict[str, str]]:
        empty = True
        for text in self._documents(split):
            empty = False
            yield {"text": text}
        if empty:
            raise UserError(
                f"No document of corpus.path={self.path} falls into the {split} split; expected at least one. Use "
                f"data.corpus.by=tail, a smaller data.corpus.unit (line, paragraph), or change "
                f"data.corpus.{'validation' if split == 'train' else split}_fraction."
            )

    def _documents(self, split: Split) -> Iterator[str]:
        if not self.path:
            yield from self._read(found(getattr(self, split), split))
            return
        files = found(self.path, "path")
        if self.by == "hash":
            yield from (text for text in self._read(files) if self._split_of(text) == split)
            return
        total = sum(len(text) for text in self._read(files))
        validation = int(total * (1 - self.validation_fraction - self.test_fraction))
        test = int(total * (1 - self.test_fraction))
        first, last = {"train": (0, validation), "validation": (validation, test), "test": (test, total)}[split]
        start = 0
        for text in self._read(files):
            part = text[max(0, first - start) : max(0, last - start)]
            start += len(text)
            if part:
                yield part

    def _split_of(self, text: str) -> Split:
        return split_of(text, self.validation_fraction, self.test_fraction)

    def _read(self, files: Sequence[Path]) -> Iterator[str]:
        """The documents of these files; whatever is wrong with one is a `UserError` that names it."""
        for path in files:
            empty = True
            for text in self._read_one(path):
                if text.strip():
                    empty = False
                    yield text
            if empty:
                raise UserError(
                    f"{path} holds no text; expected at least one document. Take it out of the list, or fill it."
                )

    def _read_one(self, path: Path) -> Iterator[str]:
        kind = _kind(path)
        unit = self.unit or ("file" if kind == "text" else "row")
        if (unit == "row") != (kind != "text"):
            expected = "file, line or paragraph" if kind == "text" else "row"
            raise UserError(
                f"corpus.unit={unit} does not fit {path}, which is read as {kind}; set data.corpus.unit={expected}."
            )
        if kind in ("jsonl", "parquet"):
            for _, row in table_rows(path, [self.field], _FIX):
                check_columns(path, [self.field], row, _FIX)
                yield self._text(path, row[self.field])
            return
        with opened_text(path, newline="" if kind in ("csv", "tsv") else None) as file:
            if kind in ("csv", "tsv"):
                yield from self._table(path, file, "," if kind == "csv" else "\t")
            elif unit == "file":
                yield file.read()
            elif unit == "line":
                yield from (line.rstrip("\n") for line in file)
            else:
                yield from _paragraphs(file)

    def _table(self, path: Path, file: IO[str], delimiter: str) -> Iterator[str]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KB is shorter than documents
        reader = csv.DictReader(file, delimiter=delimiter)
        check_columns(path, [self.field], reader.fieldnames or (), _FIX)
        try:
            yield from (self._text(path, row[self.field]) for row in reader)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; expected a table with quoted fields.") from error

    def _text(self, path: Path, value: Any) -> str:
        if not isinstance(value, str) and value is not None:
            raise UserError(
                f"{path}: column {self.field!r} holds {type(value).__name__}; expected text. Choose another with "
                "data.corpus.field=NAME."
            )
        return value or ""


def _kind(path: Path) -> str:
    return kind_of(path) or "text"


def _paragraphs(lines: IO[str]) -> Iterator[str]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\n")
            block = []
    if block:
        yield "".join(block).rstrip("\n")
