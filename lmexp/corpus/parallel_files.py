"""Aligned local files as a corpus of pairs: a file for each language, or a table with a column for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import content_hash
from lmexp.corpus.parts import (
    LeftOut,
    Part,
    Parted,
    Use,
    check_alpha,
    check_flag,
    check_languages,
    check_use,
    did_you_mean,
    pairs_of,
    refuse_empty,
    table_parts,
)
from lmexp.corpus.tables import KINDS, BrokenRows, kind_of, opened_text, table_rows, unit_of

if TYPE_CHECKING:
    from datasets import Dataset

Source = Mapping[str, str] | str | None

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass
class ParallelFiles(Parted):
    """Texts that stand line by line beside their translations, in UTF-8, plain or gzipped.

    A split is either a file for each language, `{en: train.en, de: train.de}`, a text on each line, or one table:
    csv or tsv with a column named like each language, or jsonl or Parquet with such columns, at the top or under
    `translation`.
    A text that is empty in one language makes no pair with that language (`skip_incomplete`).
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

    skip_incomplete: bool = False
    """Leave out, and count, rows of which a side of the pair is empty; False: they are an error."""

    alpha: float = 0.7
    """Parts are drawn in proportion to their tokens to this power; in [0, 1], 1: as they are."""

    cache_dir: str | None = None
    """Where content hashes and rows are kept; None: hashes are not kept, rows in the cache of `datasets`."""

    def __post_init__(self) -> None:
        if not self.splits:  # training also needs the split to train on; its job says so
            raise UserError(
                "corpus.train is not given; expected a file for each language or a table: "
                "'data.corpus.train={en: train.en, de: train.de}', or data.corpus.train=train.tsv."
            )
        check_alpha(self.alpha)
        check_use(self.use)
        check_flag("skip_incomplete", self.skip_incomplete)
        files = next((x for x in (getattr(self, split) for split in self.splits) if isinstance(x, Mapping)), {})
        languages = self.languages or list(files)
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
            elif kind_of(Path(source)) is None:
                raise UserError(
                    f"corpus.{split}={source}; expected a table that ends in {', '.join(KINDS)} (and .gz), or a "
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
        read: list[Any] = [[split, [kind_of(path) for path in files]] for split, files in named.items()]
        hashes = [content_hash(files, self.cache_dir) for files in named.values()]
        return hashlib.sha256(json.dumps([self.languages, self.quoted, read, hashes]).encode()).hexdigest()

    def rows_in(self, split: Split, language: str, beside: tuple[str, ...]) -> Dataset:
        """The texts in a language that are not empty in it and in those `beside`, in the order of the files."""
        if split not in self.splits:
            raise UserError(f"These files have no {split} split, only {', '.join(self.splits)}; set corpus.{split}.")
        rows, left_out = self._column_of(split, language, beside)
        if beside and not self.skip_incomplete:
            languages = self._ordered(language, beside)
            files = self._files(split, languages)
            refuse_empty(left_out, " and ".join(map(str, files)), unit_of(files[0]), languages)
        return rows

    def left_out(self, split: Split, language: str, beside: tuple[str, ...]) -> int:
        """How many lines these are fewer than the files have."""
        return self._column_of(split, language, beside)[1].count

    def _column_of(self, split: Split, language: str, beside: tuple[str, ...]) -> tuple[Dataset, LeftOut]:
        key = hashlib.sha256(f"{self.content_fingerprint()} {split} {language} {sorted(beside)}".encode()).hexdigest()
        return pairs_of(partial(self._column, split, language, beside), key, self.cache_dir)

    def _ordered(self, language: str, beside: tuple[str, ...]) -> list[str]:
        """In one order, whichever side is read, so that errors name the files alike."""
        return [name for name in self.languages if name == language or name in beside]

    def _column(self, split: Split, language: str, beside: tuple[str, ...]) -> Iterator[tuple[int, str | None]]:
        languages = self._ordered(language, beside)
        place = languages.index(language)
        empty = True
        for number, texts in self._rows(split, languages):
            paired = all(text.strip() for text in texts)
            empty &= not paired
            yield number, texts[place] if paired else None
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

    def _rows(self, split: Split, languages: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The number of each row and its texts in these languages, some perhaps empty."""
        files = self._files(split, languages)
        if isinstance(getattr(self, split), Mapping):
            yield from enumerate(_aligned(files), 1)
            return
        (path,) = files
        yield from _selected(path, languages, self.quoted)


def _lines(path: Path) -> Iterator[str]:
    # only \n ends a line: a lone \r or U+2028 inside a sentence would shift all that follow
    with opened_text(path, newline="\n") as file:
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


def _selected(path: Path, languages: list[str], quoted: bool | None) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The number of each row and its texts in these languages; one that a row lacks is empty."""
    broken = BrokenRows(str(path), unit_of(path))
    fix = "Name the languages as the columns are: data.corpus.languages=[en,de]."
    for number, row in table_rows(path, languages, fix, quoted=quoted, within="translation"):
        texts = tuple(row.get(name) or "" for name in languages)
        wrong = [(name, text) for name, text in zip(languages, texts, strict=True) if not isinstance(text, str)]
        for name, text in wrong:
            broken.add(number, f"column {name!r} holds {type(text).__name__}", "Expected text.")
        if not wrong:
            yield number, texts
    broken.check()
