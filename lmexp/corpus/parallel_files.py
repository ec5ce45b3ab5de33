"""Aligned local files as a corpus of pairs: a file for each language, or a table with a column for each."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import content_hash
from lmexp.corpus.parts import (
    Part,
    Parted,
    Use,
    check_alpha,
    check_languages,
    check_use,
    did_you_mean,
    rows_of,
    table_parts,
)

if TYPE_CHECKING:
    from datasets import Dataset

Source = Mapping[str, str] | str | None

_TABLES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass
class ParallelFiles(Parted):
    """Texts that stand line by line beside their translations, in UTF-8, plain or gzipped.

    A split is either a file for each language, `{en: train.en, de: train.de}`, a text on each line, or one table:
    csv or tsv with a column named like each language, or jsonl with such keys, at the top or under `translation`.
    A text that is empty in one language is left out of the pairs with that language.
    """

    train: Source = None
    """The training split: language -> file, or a table."""

    validation: Source = None
    """The same for validation; None: there is none."""

    test: Source = None
    """The same for test; None: there is none."""

    languages: tuple[str, ...] = ()
    """The languages, and with them the pairs, in this order; none: those that `train` has files for."""

    use: Use = "pairs"
    """`pairs`: each language with each other; `languages`: each alone; `both`."""

    quoted: bool | None = None
    """Whether cells of tables may stand in quotes; None: those of csv; in tsv quotes are part of the text."""

    alpha: float = 0.7
    """Parts are drawn in proportion to their tokens to this power; in [0, 1], 1: as they are."""

    cache_dir: str | None = None
    """Where content hashes and rows are kept; None: hashes are not kept, rows in the cache of `datasets`."""

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError(
                "corpus.train is not given; expected a file for each language or a table: "
                "'data.corpus.train={en: train.en, de: train.de}', or data.corpus.train=train.tsv."
            )
        check_alpha(self.alpha)
        check_use(self.use)
        languages = self.languages or (list(self.train) if isinstance(self.train, Mapping) else [])
        self.languages = check_languages(languages, 1 if self.use == "languages" else 2)
        for split in self.splits:
            source = getattr(self, split)
            if isinstance(source, Mapping):
                for language in self.languages:
                    if language not in source:
                        raise UserError(
                            f"corpus.{split} has no file for {language!r}; it has some for {', '.join(source)}."
                            f"{did_you_mean(language, source)} Add data.corpus.{split}.{language}=FILE, or leave the "
                            "language out of data.corpus.languages."
                        )
            elif _kind(Path(source)) is None:
                raise UserError(
                    f"corpus.{split}={source}; expected a table that ends in {', '.join(_TABLES)} (and .gz), or a "
                    f"file for each language: 'data.corpus.{split}={{en: FILE, de: FILE}}'."
                )

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that are set."""
        return tuple(split for split in _SPLITS if getattr(self, split))

    def parts(self) -> list[Part]:
        """The languages, the pairs of them, or both."""
        return table_parts(self, self.languages, self.use)

    def content_fingerprint(self) -> str:
        """sha256 of the files' contents and of how they are read."""
        named = {split: list(self._files(split)) for split in self.splits}
        read: list[Any] = [[split, [_kind(path) for path in files]] for split, files in named.items()]
        hashes = [content_hash(files, self.cache_dir) for files in named.values()]
        return hashlib.sha256(json.dumps([self.languages, self.quoted, read, hashes]).encode()).hexdigest()

    def rows_in(self, split: Split, language: str, beside: tuple[str, ...]) -> Dataset:
        """The texts in a language that are not empty in it and in those `beside`, in the order of the files."""
        if split not in self.splits:
            raise UserError(f"These files have no {split} split, only {', '.join(self.splits)}; set corpus.{split}.")
        key = hashlib.sha256(f"{self.content_fingerprint()} {split} {language} {sorted(beside)}".encode()).hexdigest()
        return rows_of(partial(self._column, split, language, beside), key, self.cache_dir)

    def _column(self, split: Split, language: str, beside: tuple[str, ...]) -> Iterator[str]:
        # in one order, whichever side is read, so that errors name the files alike
        languages = [name for name in self.languages if name == language or name in beside]
        place = languages.index(language)
        empty = True
        for texts in self._rows(split, languages):
            if all(text.strip() for text in texts):
                empty = False
                yield texts[place]
        if empty:
            files = " and ".join(map(str, self._files(split, languages)))
            raise UserError(
                f"No line of {files} has text in {' and '.join(languages)}; expected at least one. Give files with "
                f"text for the {split} split."
            )

    def _files(self, split: Split, languages: list[str] | None = None) -> list[Path]:
        source = getattr(self, split)
        if isinstance(source, str):
            named = {f"corpus.{split}": source}
        else:
            named = {f"corpus.{split}.{name}": source[name] for name in languages or self.languages}
        for key, path in named.items():
            if not Path(path).expanduser().is_file():
                raise UserError(f"{key}={path}: there is no such file; give one that can be read.")
        return [Path(path).expanduser() for path in named.values()]

    def _rows(self, split: Split, languages: list[str]) -> Iterator[tuple[str, ...]]:
        """The texts of each row in these languages, some perhaps empty."""
        files = self._files(split, languages)
        if isinstance(getattr(self, split), Mapping):
            yield from _aligned(files)
            return
        (path,) = files
        with _readable(path, newline="") as file:
            rows = _json_rows(path, file) if _kind(path) == "jsonl" else self._table_rows(path, file)
            yield from _selected(path, rows, languages)

    def _table_rows(self, path: Path, file: IO[str]) -> Iterator[Mapping[str, Any]]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        kind = _kind(path)
        quoted = kind == "csv" if self.quoted is None else self.quoted
        reader = csv.DictReader(
            file,
            delimiter="," if kind == "csv" else "\t",
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        missing = [name for name in self.languages if name not in (reader.fieldnames or ())]
        if missing:
            raise _no_column(path, missing[0], reader.fieldnames or ())
        try:
            for row in reader:
                if None in row or None in row.values():
                    more = "more" if None in row else "fewer"
                    raise UserError(
                        f"{path}, line {reader.line_num}: {more} cells than the {len(reader.fieldnames or ())} columns "
                        "of the first line; expected as many. If cells are quoted, say data.corpus.quoted=true."
                    )
                yield row
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; expected quotes around whole cells, doubled inside. If "
                "quotes are part of the text, say data.corpus.quoted=false."
            ) from error


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return _TABLES.get(suffixes[-1]) if suffixes else None


@contextmanager
def _readable(path: Path, newline: str) -> Iterator[IO[str]]:
    """The open file; what is wrong with it, also while it is read, is a `UserError` that names it."""
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start} of the part read); expected text in UTF-8. "
            "Convert it, for example with iconv -f latin1 -t utf-8."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged or cut off ({error}); expected a whole gzip file. Copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}. Give a path that can be read.") from error


def _lines(path: Path) -> Iterator[str]:
    # only \n ends a line: a lone \r or U+2028 inside a sentence would shift all that follow
    with _readable(path, newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _aligned(files: list[Path]) -> Iterator[tuple[str, ...]]:
    sources = [_lines(path) for path in files]
    for number, texts in enumerate(zip_longest(*sources)):
        if None in texts:
            counts = [
                number + (text is not None) + sum(1 for _ in source)
                for text, source in zip(texts, sources, strict=True)
            ]
            found = " and ".join(f"{path} has {count}" for path, count in zip(files, counts, strict=True))
            raise UserError(
                f"The numbers of lines differ: {found}; expected line n of each to be the translation of line n of the "
                "others. Give files that are aligned."
            )
        yield texts


def _json_rows(path: Path, file: IO[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); expected an object on each line.") from error
        if isinstance(row, dict) and isinstance(row.get("translation"), dict):
            row = row["translation"]
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {type(row).__name__}; expected an object on each line.")
        yield row


def _selected(path: Path, rows: Iterator[Mapping[str, Any]], languages: list[str]) -> Iterator[tuple[str, ...]]:
    """The texts in these languages; one that a row lacks is empty, one that all rows lack is an error."""
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row))
        texts = tuple(row.get(name) or "" for name in languages)
        for name, text in zip(languages, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{path}: column {name!r} holds {type(text).__name__}; expected text.")
        yield texts
    for name in languages:
        if name not in seen:
            raise _no_column(path, name, seen)


def _no_column(path: Path, name: str, columns: Any) -> UserError:
    return UserError(
        f"{path} has no column {name!r}; it has {', '.join(map(repr, columns)) or 'none'}."
        f"{did_you_mean(name, columns)} Name the languages as the columns are: data.corpus.languages=[en,de]."
    )
