"""Any data set of the `datasets` library, of texts or of translations: by its name on the hub, or a local folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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

if TYPE_CHECKING:
    from datasets import Dataset

_SLICED = re.compile(r"(?P<name>[^\[]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")


@dataclass
class Hub:
    """The rows of a hub data set; one is a document, unless `document_start` says where documents start."""

    name: str | None
    """A name on the hub, a folder in one of the hub's formats, or one that `save_to_disk` wrote."""

    config: str | None = None
    """The configuration of the data set, where it has several."""

    revision: str | None = None
    """A commit or tag of the data set on the hub; None: the newest. Recommended when streaming."""

    train: str | None = "train"
    """Its split to train on, or part of one: `train`, `train[:99%]`, `train[1000:]`."""

    validation: str | None = None
    """The same for validation; None: there is none."""

    test: str | None = None
    """The same for test; None: there is none."""

    column: str = "text"
    """The column that holds the text."""

    document_start: str | None = None
    """A regular expression: a row that it matches starts a document, and the rows to the next such are joined.
    None: each row is a document. Not when streaming."""

    streaming: bool = False
    """Tokenize the training split while training, and keep nothing on disk; slices then count rows from the front."""

    cache_dir: str | None = None
    """Where content hashes of local folders are kept; downloads stay in the cache of `datasets`."""

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("corpus.name is not given; expected a hub name or a local folder: data.corpus.name=NAME.")
        if not self.splits:  # training also needs the split to train on; its job says so
            raise UserError(
                "corpus.train is null; expected the split to train on, for example data.corpus.train=train."
            )
        if self.document_start is not None:
            if self.streaming:
                raise UserError(
                    "corpus.document_start does not work with corpus.streaming=true; set one of them to null/false."
                )
            try:
                re.compile(self.document_start)
            except re.error as error:
                raise UserError(
                    f"corpus.document_start={self.document_start!r} is no regular expression: {error}."
                ) from error

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that are set."""
        named: dict[Split, str | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        return tuple(split for split, source in named.items() if source)

    def fingerprint(self) -> str:
        """Of the content, as far as that is at hand: a local folder's files, what `datasets` says of a download; of a
        stream from the hub only the settings can be known."""
        settings = [self.config, self.train, self.validation, self.test, self.column, self.document_start]
        folder = Path(str(self.name)).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            content: Any = content_hash(files, self.cache_dir)
        elif self.streaming:
            content = [self.name, self.revision]
        else:
            content = [self.table(split)._fingerprint for split in self.splits]
        return hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()

    def rows(self, split: Split) -> Any:
        """The split as a `datasets.Dataset`, or an `IterableDataset` when streaming."""
        if split not in self.splits:
            raise UserError(
                f"corpus.{split} is null; expected a split of {self.name}, or part of one: "
                f"data.corpus.{split}='train[:1%]'."
            )
        rows = self.table(split)
        columns = rows.column_names or list(next(iter(rows), {}))
        if self.column not in columns:
            raise UserError(
                f"{self.name} has no column {self.column!r}; it has {', '.join(map(repr, columns))}. Choose one "
                "of them with data.corpus.column=NAME."
            )
        rows = rows.select_columns([self.column])
        if self.column != "text":
            rows = rows.rename_column(self.column, "text")
        if self.document_start is None:
            return rows
        from datasets import Dataset

        return Dataset.from_dict({"text": list(_joined(rows, re.compile(self.document_start)))})

    def table(self, split: Split) -> Any:
        """The split as the data set has it, with all its columns."""
        import datasets

        wanted = getattr(self, split)
        folder = Path(str(self.name)).expanduser()
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                loaded = datasets.load_from_disk(str(folder))
                name = wanted.split("[")[0]
                if isinstance(loaded, datasets.DatasetDict):
                    if name not in loaded:
                        raise UserError(f"{self.name} has no split {name!r}; it has {', '.join(loaded)}.")
                    loaded = loaded[name]
                return _part(loaded.to_iterable_dataset() if self.streaming else loaded, wanted)
            source = str(folder) if folder.is_dir() else self.name
            if not self.streaming:
                return datasets.load_dataset(source, self.config, split=wanted, revision=self.revision)
            name = wanted.split("[")[0]
            rows = datasets.load_dataset(source, self.config, split=name, revision=self.revision, streaming=True)
            return _part(rows, wanted)
        except UserError:
            raise
        except Exception as error:  # a dozen types, from here, the hub's client and its network library
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"Cannot load {wanted!r} of corpus.name={self.name} (config {self.config}): {type(error).__name__}: "
                f"{reason} Check the name, config and split; without a network, give a local folder as "
                "data.corpus.name=FOLDER, or use data=pydocs, which needs none."
            ) from error


@dataclass
class HubTranslation(Parted):
    """A hub data set whose rows hold a text in several languages: a column of {language: text}.

    A text that is empty in one language makes no pair with that language (`skip_incomplete`).
    """

    name: str | None
    """A name on the hub, a folder in one of the hub's formats, or one that `save_to_disk` wrote."""

    config: str | None = None
    """The configuration of the data set, where it has several."""

    revision: str | None = None
    """A commit or tag of the data set on the hub; None: the newest."""

    train: str | None = "train"
    """Its split to train on, or part of one: `train`, `train[:99%]`, `train[1000:]`."""

    validation: str | None = None
    """The same for validation; None: there is none."""

    test: str | None = None
    """The same for test; None: there is none."""

    column: str | None = "translation"
    """The column that holds the texts by language; None: each is a column of its own."""

    languages: tuple[str, ...] = ()
    """The languages, and with them the pairs, in this order; as the column names them."""

    use: Use = "pairs"
    """`pairs`: each language with each other; `languages`: each alone; `both`."""

    skip_incomplete: bool = True
    """Leave out, and count, rows of which a side of the pair is empty; False: they are an error."""

    alpha: float = 0.7
    """Parts are drawn in proportion to their tokens to this power; in [0, 1], 1: as they are."""

    cache_dir: str | None = None
    """Where content hashes of local folders and rows are kept; downloads stay in the cache of `datasets`."""

    def __post_init__(self) -> None:
        source = (self.name, self.config, self.revision, self.train, self.validation, self.test, self.column or "")
        self._hub = Hub(*source, cache_dir=self.cache_dir)
        check_alpha(self.alpha)
        check_use(self.use)
        check_flag("skip_incomplete", self.skip_incomplete)
        self.languages = check_languages(self.languages or (), 1 if self.use == "languages" else 2)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that are set."""
        return self._hub.splits

    def parts(self) -> list[Part]:
        """The languages, the pairs of them, or both."""
        return table_parts(self, self.languages, self.use)

    def content_fingerprint(self) -> str:
        """That of the data set."""
        return self._hub.fingerprint()

    def rows_in(self, split: Split, language: str, beside: tuple[str, ...]) -> Dataset:
        """The texts in a language that are not empty in it and in those `beside`, in the order of the data set."""
        rows, left_out = self._texts_of(split, language, beside)
        if beside and not self.skip_incomplete:
            languages = [name for name in self.languages if name == language or name in beside]
            refuse_empty(left_out, f"{getattr(self, split)!r} of {self.name}", "row", languages)
        return rows

    def left_out(self, split: Split, language: str, beside: tuple[str, ...]) -> int:
        """How many rows these are fewer than the split has."""
        return self._texts_of(split, language, beside)[1].count

    def _texts_of(self, split: Split, language: str, beside: tuple[str, ...]) -> tuple[Dataset, LeftOut]:
        key = hashlib.sha256(f"{self.content_fingerprint()} {split} {language} {sorted(beside)}".encode()).hexdigest()
        return pairs_of(partial(self._texts, split, language, beside), key, self.cache_dir)

    def _texts(self, split: Split, language: str, beside: tuple[str, ...]) -> Iterator[tuple[int, str | None]]:
        empty, number = True, 0
        for batch in self._table(split).iter(batch_size=1000):
            rows = (
                batch["text"]
                if self.column
                else (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
            )
            for texts in rows:
                paired = all(((texts or {}).get(name) or "").strip() for name in (language, *beside))
                empty &= not paired
                yield number, texts[language] if paired else None
                number += 1
        if empty:
            raise UserError(
                f"No row of {getattr(self, split)!r} of {self.name} has text in {' and '.join((language, *beside))}; "
                "expected at least one. Choose other languages or another split."
            )

    def _table(self, split: Split) -> Any:
        if self.column is not None:
            rows = self._hub.rows(split)
            self._check_column(rows.features["text"])
            return rows
        if split not in self.splits:
            self._hub.rows(split)  # says so
        rows = self._hub.table(split)
        for language in self.languages:
            if language not in rows.column_names:
                raise UserError(
                    f"{self.name} has no column {language!r}; it has {', '.join(map(repr, rows.column_names))}."
                    f"{did_you_mean(language, rows.column_names)} Choose two of them: data.corpus.languages=[...], or, "
                    "where one column holds all texts, data.corpus.column=NAME."
                )
            if getattr(rows.features[language], "dtype", None) not in ("string", "large_string"):
                raise UserError(
                    f"{self.name}: column {language!r} holds {rows.features[language]}; expected text. Choose another: "
                    "data.corpus.languages=[...]."
                )
        return rows.select_columns(list(self.languages))

    def _check_column(self, feature: Any) -> None:
        names = getattr(feature, "languages", None) or (list(feature) if isinstance(feature, dict) else None)
        if names is None:
            raise UserError(
                f"{self.name}: column {self.column!r} holds {feature}; expected texts by language, such as "
                "{en: ..., de: ...}. Choose another with data.corpus.column=NAME, or use data=hub."
            )
        for language in self.languages:
            if language not in names:
                raise UserError(
                    f"{self.name} has no {language!r} in column {self.column!r}; it has "
                    f"{', '.join(map(repr, names))}.{did_you_mean(language, names)} Choose some of them: "
                    f"data.corpus.languages=[{','.join(list(names)[:2])}]."
                )


def _part(rows: Any, wanted: str) -> Any:
    """The slice of `rows` that `name[start:stop]` means."""
    match = _SLICED.fullmatch(wanted)
    if match is None:
        if "[" in wanted:
            raise UserError(f"Split {wanted!r}: expected a name or name[start:stop], such as train[1000:].")
        return rows
    if hasattr(rows, "__len__"):
        n = len(rows)
        start, stop, _ = slice(_row(match["start"], n), _row(match["stop"], n)).indices(n)
        return rows.select(range(start, max(start, stop)))
    if "%" in wanted or "-" in wanted:
        raise UserError(
            f"Split {wanted!r} of a stream: its length is not known; count rows from the front: train[1000:]."
        )
    start = int(match["start"] or 0)
    rows = rows.skip(start) if start else rows
    return rows.take(max(0, int(match["stop"]) - start)) if match["stop"] else rows


def _row(place: str | None, n: int) -> int | None:
    if place is None:
        return None
    return round(int(place[:-1]) * n / 100) if place.endswith("%") else int(place)


def _joined(rows: Any, start: re.Pattern[str]) -> Iterator[str]:
    parts: list[str] = []
    for row in rows:
        text = row["text"] or ""
        if start.match(text) and "".join(parts).strip():
            yield "".join(parts)
            parts = []
        parts.append(text)
    if "".join(parts).strip():
        yield "".join(parts)
