"""Texts with labels, of local files or the hub: what a text, or two beside one another, are an example of."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import content_hash, split_of
from lmexp.corpus.hub import Hub
from lmexp.corpus.tables import KINDS, BrokenRows, Paths, check_columns, found, kind_of, short, table_rows, unit_of

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COLUMNS = ("text", "text2")
"""Of the texts of a row."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


class LabelledCorpus(Protocol):
    """A corpus whose texts have labels."""

    streaming: bool
    """Always False."""

    multilabel: bool
    """Whether a row has any number of labels, none among them; else it has one."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes: label i of a row is `labels[i]`. May read the training split."""
        ...

    @property
    def n_texts(self) -> int:
        """Texts of a row: 1, or 2 of which the label says how they stand to one another."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """Kinds of rows that evaluation tells apart, such as languages; () for none. May read all splits."""
        ...

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are, without reading them."""
        ...

    def fingerprint(self) -> str:
        """A hash of the content (not of the path) and of how it is read."""
        ...

    def rows(self, split: Split) -> Any:
        """The split as a `datasets.Dataset` in the order of its source: `text`, and `text2` where there are two, large
        strings, never empty; `label`, int64, or with `multilabel` a list of int64 in rising order; `group`, int64, an
        index into `groups`, 0 where there are none. Raises one `UserError` for all rows of a source that are wrong."""
        ...


@dataclass(frozen=True)
class Source:
    """A table of rows, as errors name it."""

    name: str
    """A file, or a split of a data set."""

    unit: str
    """What numbers stand for: a `line`, or a `row` counted from 0."""

    rows: Callable[[], Iterator[tuple[int, Mapping[str, Any]]]]
    """The number of each row, and its columns."""

    separator: str | None = None
    """What parts several labels of a row; None: they are a list."""

    group: str = ""
    """The group of all its rows, where no column says it."""

    hidden: str = ""
    """What to do about labels of -1, where these stand for labels that are not published."""


class Wrong(NamedTuple):
    """What is wrong with a row, and what mends it."""

    what: str
    fix: str
    lacks: bool = False
    """Whether the row lacks something, and may be left out for it."""


class Labelled(ABC):
    """What labelled corpora have in common, wherever their rows come from."""

    streaming = False
    named_only = False
    """Whether rows have to name their classes as `labels` does, which came from elsewhere: a number is no name."""

    def __init__(
        self,
        given: Mapping[Split, Any],
        text: str | Sequence[str],
        label: str,
        group: str | None,
        labels: Sequence[Any] | None,
        multilabel: bool,
        skip_incomplete: bool,
        fractions: Mapping[Split, float],
        cache_dir: str | None,
    ) -> None:
        """`given` and `fractions`: what is set for each split; the rest is as in `LabelledFiles`."""
        self.text = (text,) if isinstance(text, str) else tuple(text or ())
        self.label = label
        self.group = group
        self.multilabel = multilabel
        self.skip_incomplete = skip_incomplete
        self.cache_dir = cache_dir
        self.given = {split: source for split, source in given.items() if source}
        self.fractions = fractions
        if len(self.text) not in (1, 2) or len(set(self.text)) < len(self.text):
            raise UserError(
                f"corpus.text={text}; expected a column, or a list of two: data.corpus.text=[premise,hypothesis]."
            )
        if not self.given:  # training also needs the split to train on; its job says so
            raise UserError("corpus.train is not given; expected what to train on: data.corpus.train=NAME.")
        if any(share < 0 for share in fractions.values()) or sum(fractions.values()) >= 1:
            shares = " and ".join(f"corpus.{split}_fraction={share}" for split, share in fractions.items())
            raise UserError(f"{shares}: expected fractions from 0 on that leave something to train on, such as 0.05.")
        for split, share in fractions.items():
            if share and split in self.given:
                raise UserError(
                    f"corpus.{split}={self.given[split]} and corpus.{split}_fraction={share} exclude each other; set "
                    f"data.corpus.{split}=null to cut it from train, or data.corpus.{split}_fraction=0."
                )
        self.given_labels = None if labels is None else _checked(labels, least=1 if multilabel else 2)
        self._read_rows: dict[Split, Dataset] = {}
        self._encoded: dict[Split, Dataset] = {}

    @abstractmethod
    def content(self) -> Any:
        """Hashes of the content, and how it is read, for `json`."""

    @abstractmethod
    def sources(self, split: Split) -> list[Source]:
        """The tables of a split that is given, in order."""

    def declared_labels(self) -> tuple[str, ...] | None:
        """The names of the classes that the data set itself has, in order; None: it names none."""
        return None

    @property
    def n_texts(self) -> int:
        """1, or 2."""
        return len(self.text)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those given, and those cut from train."""
        return tuple(split for split in _SPLITS if split in self.given or self.fractions.get(split))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Those given or declared; else those of the training rows, before any cut, sorted, numbers by their value."""
        if self.given_labels:
            return self.given_labels
        if "train" not in self.given:
            raise UserError(
                "corpus.train is not given, whose rows have the classes; give it, or name them with "
                "data.corpus.labels=[...]."
            )
        named = self.declared_labels()
        if named:
            return named
        read = self._rows("train")
        labels = _in_order(_distinct(read, "label"))
        if len(labels) < (1 if self.multilabel else 2):
            raise self._too_few(labels)
        if len(labels) > max(100, len(read) // 2):
            raise UserError(
                f"{self._names('train')}: the {len(read)} training rows have {len(labels)} different labels, such as "
                f"{short(labels[0])}; expected a few that recur. Choose the column of labels with "
                "data.corpus.label=NAME, or name all labels in order: data.corpus.labels=[...]."
            )
        return labels

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Those of all splits, sorted, numbers by their value; () where no column says them."""
        if self.group is None:
            return ()
        return _in_order({name for split in self.given for name in _distinct(self._rows(split), "group")})

    def fingerprint(self) -> str:
        """sha256 of the content and of the settings."""
        return _sha256([self._settings, dict(self.fractions), self.content()])

    def rows(self, split: Split) -> Dataset:
        """`text`, perhaps `text2`, `label` and `group`, in the order of the source."""
        if split not in self.splits:
            cut = "" if split == "train" else f", or data.corpus.{split}_fraction=0.05 to cut it from train"
            raise UserError(
                f"This corpus has no {split} split, only {', '.join(self.splits)}; set data.corpus.{split}=NAME{cut}."
            )
        if split not in self._encoded:
            self._encoded[split] = self._encode(split)
        return self._encoded[split]

    @property
    def _settings(self) -> list[Any]:
        return [self.text, self.label, self.group, self.given_labels, self.multilabel, self.skip_incomplete]

    def _encode(self, split: Split) -> Dataset:
        from datasets import Dataset, Features, Value, concatenate_datasets

        source: Split = split if split in self.given else "train"
        read = self._rows(source)
        labels = self._numbers(source)
        places = {name: place for place, name in enumerate(self.groups)}
        groups = [places[name] if places else 0 for name in _column(read, "group")]
        number = Value("int64")
        features = Features({"label": [number] if self.multilabel else number, "group": number})
        encoded = Dataset.from_dict({"label": labels, "group": groups}, features=features)
        rows = concatenate_datasets([read.select_columns(list(COLUMNS[: self.n_texts])), encoded], axis=1)
        if source == "train" and any(self.fractions.values()):
            kept = [row for row, text in enumerate(_column(read, "text")) if self._split_of(text) == split]
            if not kept:
                raise UserError(
                    f"None of the {len(labels)} training rows falls into the {split} split; expected at least one. "
                    f"Change data.corpus.{'validation' if split == 'train' else split}_fraction."
                )
            rows, labels = rows.select(kept), [labels[row] for row in kept]
        if split == "train" and not self.multilabel and len(set(labels)) < 2:
            raise self._too_few([self.labels[labels[0]]])
        return rows

    def _split_of(self, text: str) -> Split:
        """By the first text alone: rows that share it stand in one split."""
        return split_of(text, self.fractions["validation"], self.fractions["test"])

    def _numbers(self, split: Split) -> list[Any]:
        """The labels of a split's rows as numbers."""
        read = self._rows(split)
        numbers = _numbers_of(self.labels, indices=self.given_labels is not None and not self.named_only)
        found = [names if self.multilabel else [names] for names in _column(read, "label")]
        if any(name not in numbers for names in found for name in names):
            self._refuse(split, found, numbers)
        if self.multilabel:
            return [sorted({numbers[name] for name in names}) for names in found]
        return [numbers[name] for (name,) in found]

    def _refuse(self, split: Split, found: Sequence[Sequence[str]], known: Collection[str]) -> None:
        """Raise `UserError` for the labels of rows that are not `known`."""
        names = ", ".join(map(short, self.labels[:20])) + (", ..." if len(self.labels) > 20 else "")
        fix = f"Expected one of {names}: data.corpus.labels names them all."
        if self.given_labels is None:
            fix = f"The training split has {names}. Mend the label, or name all in order: data.corpus.labels=[...]."
        broken = [BrokenRows(source.name, source.unit) for source in self.sources(split)]
        read = self._rows(split)
        for labels, place, number in zip(found, _column(read, "source"), _column(read, "number"), strict=True):
            for name in labels:
                if name not in known:
                    broken[place].add(number, f"label {short(name)} is none of the classes", fix)
        for one in broken:
            one.check()

    def _names(self, split: Split) -> str:
        return ", ".join(source.name for source in self.sources(split))

    def _too_few(self, labels: Sequence[str]) -> UserError:
        has = f"only the label {short(labels[0])}" if labels else "no labels"
        least = "one" if self.multilabel else "two"
        return UserError(
            f"{self._names('train')}: the training rows have {has}; expected at least {least}. Choose another column "
            "with data.corpus.label=NAME, or, if rows are sorted by label, take some from all over."
        )

    def _rows(self, split: Split) -> Dataset:
        """The rows of a given split, their labels and groups as texts, and the source and number of each."""
        if split not in self._read_rows:
            self._read_rows[split] = self._read(split)
        return self._read_rows[split]

    def _read(self, split: Split) -> Dataset:
        from datasets import Dataset, Features, Value
        from datasets.exceptions import DatasetGenerationError

        name, number = Value("string"), Value("int64")
        texts = dict.fromkeys(COLUMNS[: self.n_texts], Value("large_string"))
        kept = {"label": [name] if self.multilabel else name, "group": name, "source": number, "number": number}
        try:
            return Dataset.from_generator(
                self._checked_rows,
                gen_kwargs={"split": split},
                features=Features({**texts, **kept}),
                cache_dir=None if self.cache_dir is None else str(Path(self.cache_dir) / "datasets"),
                fingerprint=_sha256([self._settings, self.content(), split])[:32],
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None

    def _checked_rows(self, split: Split) -> Iterator[dict[str, Any]]:
        for place, source in enumerate(self.sources(split)):
            broken = BrokenRows(source.name, source.unit)
            n_rows = n_kept = 0
            for number, row in source.rows():
                n_rows += 1
                wrong: list[Wrong] = []
                values = self._texts_of(row, wrong)
                values["label"] = self._label_of(row, source, wrong)
                values["group"] = self._group_of(row, source, wrong)
                if not wrong:
                    n_kept += 1
                    yield {**values, "source": place, "number": number}
                elif not (self.skip_incomplete and all(one.lacks for one in wrong)):
                    for one in wrong:
                        broken.add(number, one.what, one.fix)
            broken.check()
            if not n_kept:
                lack = f"{n_rows} rows, all of which lack something" if n_rows else "no rows"
                raise UserError(f"{source.name} has {lack}; expected at least one row. Give another for {split}.")

    def _texts_of(self, row: Mapping[str, Any], wrong: list[Wrong]) -> dict[str, Any]:
        """The texts; what is wrong with them is added to `wrong`."""
        for column in self.text:
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                what = f"{type(text).__name__} in column {column!r}"
                wrong.append(Wrong(what, "Choose a column of texts with data.corpus.text=NAME."))
            elif not (text or "").strip():
                wrong.append(self._lacking(f"no text in column {column!r}"))
        return {name: row.get(column) for name, column in zip(COLUMNS, self.text, strict=False)}

    def _label_of(self, row: Mapping[str, Any], source: Source, wrong: list[Wrong]) -> Any:
        """The name of the label, or a list of them; `wrong` as above."""
        value = row.get(self.label)
        if not self.multilabel:
            return self._name_of(value, source, wrong)
        if source.separator is not None and isinstance(value, str):
            value = [name for name in value.split(source.separator) if name.strip()]
        if isinstance(value, list):
            return [self._name_of(name, source, wrong) for name in value]
        fix = "Expected a list of labels, [] for none; or set data.corpus.multilabel=false."
        what = f"{'no list' if value is None else type(value).__name__} in column {self.label!r}"
        wrong.append(Wrong(what, fix, lacks=value is None))
        return []

    def _name_of(self, value: Any, source: Source, wrong: list[Wrong]) -> str | None:
        name = _name(value)
        if value is None or name == "":
            wrong.append(self._lacking(f"no label in column {self.label!r}"))
        elif name is None:
            fix = "Expected a text, a whole number or a truth value; a list of them needs data.corpus.multilabel=true."
            wrong.append(Wrong(f"{type(value).__name__} in column {self.label!r}", fix))
        elif name == "-1" and source.hidden and name not in (self.given_labels or ()):
            wrong.append(Wrong("label -1, which stands for one that is not published", source.hidden, lacks=True))
        return name

    def _group_of(self, row: Mapping[str, Any], source: Source, wrong: list[Wrong]) -> str | None:
        if self.group is None:
            return source.group
        name = _name(row.get(self.group))
        if not name:
            wrong.append(self._lacking(f"no group in column {self.group!r}"))
        return name

    def _lacking(self, what: str) -> Wrong:
        return Wrong(what, "Fill it in, or leave such rows out: data.corpus.skip_incomplete=true.", lacks=True)


class LabelledFiles(Labelled):
    """Rows of local tables, csv, tsv, jsonl or Parquet, plain or gzipped, told by their ending, in UTF-8."""

    def __init__(
        self,
        train: Paths = None,
        validation: Paths = None,
        test: Paths = None,
        text: str | Sequence[str] = "text",
        label: str = "label",
        group: str | None = None,
        labels: Sequence[Any] | None = None,
        multilabel: bool = False,
        skip_incomplete: bool = False,
        separator: str = ",",
        quoted: bool | None = None,
        columns: Sequence[str] | None = None,
        validation_fraction: float = 0.0,
        test_fraction: float = 0.0,
        cache_dir: str | None = None,
    ) -> None:
        """What the `data.corpus` node of the configuration sets.

        `train`, `validation` and `test`: a file, a glob or a list of these; without one, `validation_fraction` and
        `test_fraction` of the training rows are taken, by what the first text is.
        `text`: the column of the text, or two. `label`: that of the label, a text, a whole number or a truth value.
        `group`: that of the kind of example, if evaluation is to tell kinds apart.
        `labels`: the names of the classes in order; None: all that the training rows have, sorted. Where the names are
        no numbers, the files may hold their numbers, from 0, or for two of them false and true.
        `multilabel`: a row has any number of labels: a list, or in csv and tsv a text with `separator` between them.
        `skip_incomplete`: leave out rows that lack text, label or group, which else are an error.
        `quoted`: whether cells of csv and tsv may stand in quotes; None: those of csv. `columns`: what their columns
        are called, if no line of the files says it.
        `cache_dir`: where content hashes and rows are kept; None: hashes are not kept, rows in the cache of `datasets`.
        """
        given: dict[Split, Paths] = {"train": train, "validation": validation, "test": test}
        fractions: dict[Split, float] = {"validation": validation_fraction, "test": test_fraction}
        super().__init__(given, text, label, group, labels, multilabel, skip_incomplete, fractions, cache_dir)
        if not separator:
            raise UserError("corpus.separator is empty; expected what stands between labels, such as ','.")
        self.separator = separator
        self.quoted = quoted
        self.columns = None if columns is None else list(columns)
        if self.columns is not None:
            check_columns("corpus.columns", self._wanted, self.columns, "Name all columns of the files, in order.")

    @property
    def _wanted(self) -> list[str]:
        return [*self.text, self.label, *([self.group] if self.group else [])]

    def content(self) -> Any:
        """sha256 of the files of each split, and how they are read; a file that did not change is not read again."""
        files = {split: self._files(split) for split in self.given}
        kinds = [[split, [kind_of(path) for path in paths]] for split, paths in files.items()]
        hashes = [content_hash(paths, self.cache_dir) for paths in files.values()]
        return [self.separator, self.quoted, self.columns, kinds, hashes]

    def sources(self, split: Split) -> list[Source]:
        """One for each file."""
        return [self._source(path) for path in self._files(split)]

    def _files(self, split: Split) -> list[Path]:
        files = found(self.given[split], split)
        for path in files:
            if kind_of(path) is None:
                raise UserError(
                    f"corpus.{split}: {path} is no table; expected one that ends in {', '.join(KINDS)} (and .gz)."
                )
            if self.columns is not None and kind_of(path) not in ("csv", "tsv"):
                raise UserError(
                    f"corpus.columns={self.columns} does not fit {path}, whose columns have names; set "
                    "data.corpus.columns=null."
                )
        return files

    def _source(self, path: Path) -> Source:
        texts = "NAME" if self.n_texts == 1 else "[NAME,NAME]"
        fix = f"Choose others: data.corpus.text={texts} data.corpus.label=NAME"
        fix += "." if self.group is None else " data.corpus.group=NAME."
        flat = kind_of(path) in ("csv", "tsv")
        if flat:
            fix += " If these are no names but the first row, name the columns: data.corpus.columns=[NAME,NAME]."
        rows = partial(table_rows, path, self._wanted, fix, names=self.columns, quoted=self.quoted)
        return Source(str(path), unit_of(path), rows, separator=self.separator if flat else None)


class LabelledHub(Labelled):
    """Rows of a data set of the hub, or of a local folder in one of the hub's formats."""

    def __init__(
        self,
        name: str | None = None,
        config: str | Sequence[str] | None = None,
        train_configs: Sequence[str] | None = None,
        revision: str | None = None,
        train: str | None = "train",
        validation: str | None = None,
        test: str | None = None,
        text: str | Sequence[str] = "text",
        label: str = "label",
        group: str | None = None,
        labels: Sequence[Any] | None = None,
        multilabel: bool = False,
        skip_incomplete: bool = False,
        validation_fraction: float = 0.0,
        test_fraction: float = 0.0,
        cache_dir: str | None = None,
    ) -> None:
        """What the `data.corpus` node of the configuration sets.

        `name`: on the hub, or a folder, also one that `save_to_disk` wrote. `revision`: a commit or tag on the hub;
        None: the newest.
        `config`: the configuration of the data set; of a list, such as languages, each is a group of its own,
        validation and test hold all of them one after the other, and train those of `train_configs`, else the first.
        `train`, `validation` and `test`: its splits, or parts of them: `train`, `train[:99%]`, `train[1000:]`.
        `labels`: the names of the classes in order; None: those of the data set, else all that the training rows
        have, sorted. Other names, as many as the data set has, rename its classes.
        `skip_incomplete`: labels of -1, which stand for ones that are not published or not agreed on, are lacking too.
        `cache_dir`: where content hashes of local folders and rows are kept; downloads stay in the cache of `datasets`.
        The rest is as in `LabelledFiles`.
        """
        given: dict[Split, str | None] = {"train": train, "validation": validation, "test": test}
        fractions: dict[Split, float] = {"validation": validation_fraction, "test": test_fraction}
        if not name:
            raise UserError("corpus.name is not given; expected a hub name or a local folder: data.corpus.name=NAME.")
        super().__init__(given, text, label, group, labels, multilabel, skip_incomplete, fractions, cache_dir)
        self.name = name
        several = config is not None and not isinstance(config, str)
        self.configs: list[Any] = list(config) if several and config else [config]
        self.train_configs: list[Any] = list(train_configs) if train_configs else self.configs[:1]
        if several and (not config or len(set(self.configs)) < len(self.configs)):
            raise UserError(f"corpus.config={config}; expected a configuration, or a list of different ones.")
        if several and group is not None:
            raise UserError(f"corpus.group={group} does not go with several configs, which are groups; set it to null.")
        strange = [wanted for wanted in self.train_configs if wanted not in self.configs]
        if isinstance(train_configs, str) or strange:
            raise UserError(
                f"corpus.train_configs={train_configs}; expected some of corpus.config, a list: "
                f"{', '.join(map(str, self.configs))}."
            )
        self._several = several
        self._hubs = {one: Hub(name, one, revision, train, validation, test) for one in self.configs}
        self._loaded: dict[tuple[str | None, Split], Any] = {}

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The configurations where there are several, else those of the column."""
        return tuple(self.configs) if self._several else super().groups

    def content(self) -> Any:
        """A local folder's files, or what `datasets` says of a download; with what is read of it."""
        read = [self.configs, self.train_configs, self._several, self.given]
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return [read, content_hash(files, self.cache_dir)]
        tables = [(config, split) for split in self.given for config in self._configs(split)]
        return [read, [self._load(config, split)._fingerprint for config, split in tables]]

    def declared_labels(self) -> tuple[str, ...] | None:
        """Those of the label column, if it is one of classes."""
        rows = self._load(self.train_configs[0], "train")
        self._check_columns(self._title(self.train_configs[0], "train"), rows)
        return _class_names(rows.features[self.label])

    def sources(self, split: Split) -> list[Source]:
        """One for each configuration."""
        return [self._source(config, split) for config in self._configs(split)]

    def _configs(self, split: Split) -> list[Any]:
        return self.train_configs if split == "train" else self.configs

    def _load(self, config: str | None, split: Split) -> Any:
        if (config, split) not in self._loaded:
            self._loaded[config, split] = self._hubs[config].table(split)
        return self._loaded[config, split]

    def _title(self, config: str | None, split: Split) -> str:
        return f"{self.name}{'' if config is None else f' ({config})'}, split {self.given[split]!r}"

    def _check_columns(self, title: str, rows: Any) -> list[str]:
        wanted = [*self.text, self.label, *([self.group] if self.group else [])]
        fix = "Choose others: data.corpus.text=NAME data.corpus.label=NAME."
        check_columns(title, wanted, rows.column_names, fix)
        return wanted

    def _source(self, config: str | None, split: Split) -> Source:
        title = self._title(config, split)
        rows = self._load(config, split)
        rows = rows.select_columns(self._check_columns(title, rows))
        names = {column: _class_names(feature) for column, feature in rows.features.items()}
        classes = names[self.label]
        if classes:
            names[self.label] = self._renamed(classes)
        null = "" if split == "train" else ", or null for none"
        hidden = f"Choose another split, data.corpus.{split}=NAME{null}; or leave such rows out: "
        hidden += "data.corpus.skip_incomplete=true."
        if not classes:
            hidden += " If -1 is a class, name all classes: data.corpus.labels=[-1,1]."
        group = str(config) if self._several else ""
        return Source(title, "row", partial(_hub_rows, rows, names), group=group, hidden=hidden)

    def _renamed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What the configuration calls the classes of the data set."""
        labels = self.given_labels
        if labels is None or set(names) <= set(labels):
            return names
        if len(names) == len(labels) and not set(names) & set(labels) and not self.named_only:
            return labels
        raise UserError(
            f"corpus.labels={list(labels)} does not fit the classes of {self.name}, {', '.join(names)}; expected these "
            f"in any order, as many other names to rename them, or null: data.corpus.labels=null."
        )


def _hub_rows(rows: Any, names: Mapping[str, Sequence[str] | None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers; classes as their names."""
    number = 0
    for batch in rows.iter(batch_size=1000):
        columns = {name: [_decoded(value, names[name]) for value in values] for name, values in batch.items()}
        for values in zip(*columns.values(), strict=True):
            yield number, dict(zip(columns, values, strict=True))
            number += 1


def _decoded(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_decoded(one, names) for one in value]
    return names[value] if value >= 0 else value


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of a column of classes, or of lists of them; None: it is another."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return tuple(names) if isinstance(names, list) else None


def _numbers_of(labels: Sequence[str], indices: bool) -> dict[str, int]:
    """What stands for each class: its name, and with `indices`, unless names are numbers, its number too."""
    numbers = {name: number for number, name in enumerate(labels)}
    if indices and not any(_NUMBER.fullmatch(name) for name in labels):
        numbers |= {str(number): number for number in range(len(labels))}
        if len(labels) == 2 and not {"false", "true"} & set(labels):
            numbers |= {"false": 0, "true": 1}
    return numbers


def _checked(labels: Sequence[Any], least: int) -> tuple[str, ...]:
    names = () if isinstance(labels, str) else tuple(_name(label) or "" for label in labels)
    if len(names) < least or "" in names or len(set(names)) < len(names):
        raise UserError(
            f"corpus.labels={labels}; expected a list of at least {least} different names, in order: "
            "data.corpus.labels=[negative,positive], or null."
        )
    return names


def _name(value: Any) -> str | None:
    """The text of a label or group; None: it cannot be one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return value.strip() if isinstance(value, str) else None


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    if all(_NUMBER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def _column(rows: Any, name: str) -> Iterator[Any]:
    for batch in rows.select_columns([name]).iter(batch_size=1000):
        yield from batch[name]


def _distinct(rows: Any, column: str) -> set[str]:
    """The texts of a column, or of the lists in it."""
    found: set[str] = set()
    for value in _column(rows, column):
        found.update([value] if isinstance(value, str) else value)
    return found


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
