"""Corpora of several parts: texts in many languages, and texts beside their translations."""

from __future__ import annotations

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lmexp.contracts import Corpus, Split, UserError
from lmexp.corpus.content import write_json

if TYPE_CHECKING:
    from datasets import Dataset

Use = Literal["pairs", "languages", "both"]


class Texts(Corpus, Protocol):
    """The texts of one language: a corpus that says which splits it has."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are, without reading them."""
        ...


@dataclass(frozen=True)
class Part:
    """One component of a corpus of several: text in one language, or a text and its translation."""

    name: str
    """`en`, or `en-de`."""

    languages: tuple[str, ...]
    """`("en",)`, or `("en", "de")`."""

    corpora: tuple[Texts, ...]
    """One for each language. Those of a pair have equally many rows, none empty: row i is the translation of row i."""


class PartedCorpus(Protocol):
    """What a corpus of several parts offers beside what every corpus does."""

    streaming: bool
    """Always False."""

    languages: tuple[str, ...]
    """Of all parts, in the order of first mention."""

    alpha: float
    """A part is drawn with a probability proportional to its training tokens to the power of `alpha`."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that all parts have."""
        ...

    def parts(self) -> list[Part]:
        """The parts, without reading them."""
        ...

    def fingerprint(self) -> str:
        """A hash of what all parts hold and of `alpha`."""
        ...

    def rows(self, split: Split) -> Any:
        """The texts of all parts as one `datasets.Dataset`."""
        ...


class Parted(ABC):
    """What follows from the parts of a corpus."""

    streaming = False
    languages: tuple[str, ...]
    alpha: float

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """The splits that all parts have."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """The parts, without reading them."""

    def fingerprint(self) -> str:
        """sha256 of the names, languages and contents of the parts, and of `alpha`."""
        parts = [[part.name, part.languages, [side.fingerprint() for side in part.corpora]] for part in self.parts()]
        return hashlib.sha256(json.dumps([self.alpha, parts]).encode()).hexdigest()

    def rows(self, split: Split) -> Dataset:
        """The texts of all parts, one language after the other; a text that stands in several parts stands once."""
        from datasets import Features, Value, concatenate_datasets

        features = Features({"text": Value("large_string")})
        found = [side.rows(split) for sides in _sides(self.parts()).values() for side in sides]
        return concatenate_datasets([rows if rows.features == features else rows.cast(features) for rows in found])


class Table(Protocol):
    """Texts whose columns are languages, a row holding one text in each."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are."""
        ...

    def content_fingerprint(self) -> str:
        """A hash of the whole table."""
        ...

    def rows_in(self, split: Split, language: str, beside: tuple[str, ...]) -> Dataset:
        """The texts in a language as rows of `text`, without those that are empty in it or in a language `beside`."""
        ...

    def left_out(self, split: Split, language: str, beside: tuple[str, ...]) -> int:
        """How many rows these are fewer than the split has."""
        ...


@dataclass(frozen=True)
class Side:
    """One language of a table, alone or beside others."""

    table: Table
    language: str
    beside: tuple[str, ...] = ()
    """Languages that must have the text too."""

    streaming = False

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those of the table."""
        return self.table.splits

    def alone(self) -> Side:
        """The language by itself, whatever the others have."""
        return Side(self.table, self.language)

    def fingerprint(self) -> str:
        """sha256 of the table and of which of it this is."""
        named = [self.table.content_fingerprint(), self.language, *sorted(self.beside)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def rows(self, split: Split) -> Dataset:
        """The texts, in the order of the table."""
        return self.table.rows_in(split, self.language, self.beside)

    def left_out(self, split: Split) -> int:
        """How many rows of the table are no pairs, as a text of theirs is empty."""
        return self.table.left_out(split, self.language, self.beside)


def smoothed(sizes: Sequence[float], alpha: float) -> list[float]:
    """Shares that sum to 1, proportional to the sizes to the power of `alpha`.

    With q_l = n_l / sum n, the share is q_l^alpha / sum q^alpha (Lample and Conneau 2019, section 3.1): 1 keeps the
    sizes, 0 makes all equal. What has no size gets no share.
    """
    total = sum(sizes)
    powers = [(size / total) ** alpha if size > 0 else 0.0 for size in sizes]
    return [power / sum(powers) for power in powers]


def smoothed_texts(corpus: PartedCorpus) -> Iterator[str]:
    """The training texts to learn one vocabulary for all languages from.

    Of as many bytes as there are in all, each language gives its smoothed share: its texts in order, from the first
    again when they do not suffice, the last one cut. Deterministic; a text in several parts counts once.
    """
    sides = _sides(corpus.parts())
    sizes = [sum(len(text.encode()) for text in _training(sides[language])) for language in sides]
    for language, size in zip(sides, sizes, strict=True):
        if not size:
            raise UserError(
                f"The training split has no text in {language!r}; expected at least one document. Give it some, or "
                "leave the language out."
            )
    for language, share in zip(sides, smoothed(sizes, corpus.alpha), strict=True):
        left = round(share * sum(sizes))
        while left > 0:
            for text in _training(sides[language]):
                encoded = text.encode()
                if len(encoded) > left:
                    text = encoded[:left].decode(errors="ignore")
                if text:
                    yield text
                left -= len(encoded)
                if left <= 0:
                    break


def check_alpha(alpha: float) -> None:
    """Raise `UserError` unless it is in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise UserError(
            f"corpus.alpha={alpha}; expected a number from 0 (all parts alike) to 1 (as they are), for example 0.7."
        )


def check_use(use: str) -> None:
    """Raise `UserError` unless it is a `Use`."""
    if use not in ("pairs", "languages", "both"):
        raise UserError(f"corpus.use={use!r}; expected pairs, languages or both.")


def check_languages(languages: Sequence[str], least: int) -> tuple[str, ...]:
    """The languages as a tuple; raises `UserError` for fewer than `least` of them and for one given twice."""
    if isinstance(languages, str) or len(languages) < least:
        why = ", because corpus.use makes pairs" if least > 1 else ""
        raise UserError(
            f"corpus.languages={languages}; expected a list of at least {least}{why}: data.corpus.languages=[en,de]."
        )
    for language in languages:
        if list(languages).count(language) > 1:
            raise UserError(f"corpus.languages names {language!r} twice; leave one of them out.")
    return tuple(languages)


def table_parts(table: Table, languages: Sequence[str], use: Use) -> list[Part]:
    """Each language alone, each beside each other one, or both."""
    singles = [single(table, language) for language in languages]
    pairs = [pair(table, *two) for two in combinations(languages, 2)]
    return {"languages": singles, "pairs": pairs, "both": singles + pairs}[use]


def single(table: Table, language: str) -> Part:
    """The part that is one language."""
    return Part(language, (language,), (Side(table, language),))


def pair(table: Table, first: str, second: str) -> Part:
    """The part that is two languages side by side."""
    return Part(f"{first}-{second}", (first, second), (Side(table, first, (second,)), Side(table, second, (first,))))


def rows_of(texts: Callable[[], Iterator[str]], fingerprint: str, cache_dir: str | None) -> Dataset:
    """Rows of `text`, written once for each fingerprint; a `UserError` in making them comes out as it is."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _as_rows,
            gen_kwargs={"texts": texts},
            features=Features({"text": Value("large_string")}),
            cache_dir=None if cache_dir is None else str(Path(cache_dir) / "datasets"),
            fingerprint=fingerprint[:32],
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


@dataclass(frozen=True)
class LeftOut:
    """Rows that are no pairs, as one of their texts is empty."""

    count: int
    """How many there are."""

    first: tuple[int, ...]
    """The numbers of the first ten."""


def pairs_of(
    rows: Callable[[], Iterator[tuple[int, str | None]]], fingerprint: str, cache_dir: str | None
) -> tuple[Dataset, LeftOut]:
    """One side of the pairs as `rows_of`, and what is left out of them, which stands beside it in the cache.

    `rows` gives the number of each row and its text; None where the row is no pair.
    """
    kept = _Kept(rows)
    dataset = rows_of(kept, fingerprint, cache_dir)
    path = Path(dataset.cache_files[0]["filename"]).with_suffix(".left_out.json")
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        return dataset, LeftOut(content["count"], tuple(content["first"]))
    if not kept.read:  # the rows are of before this was counted
        for _ in kept():
            pass
    write_json(path, {"count": kept.count, "first": kept.first})
    return dataset, LeftOut(kept.count, tuple(kept.first))


class _Kept:
    """The texts of rows that have some, and afterwards what of them had none."""

    def __init__(self, rows: Callable[[], Iterator[tuple[int, str | None]]]) -> None:
        self.rows = rows
        self.read = False
        self.count = 0
        self.first: list[int] = []

    def __call__(self) -> Iterator[str]:
        self.count, self.first = 0, []
        for number, text in self.rows():
            if text is not None:
                yield text
                continue
            self.count += 1
            if len(self.first) < 10:
                self.first.append(number)
        self.read = True


def check_flag(name: str, value: bool) -> None:
    """Raise `UserError` unless it is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"corpus.{name}={value!r}; expected true or false.")


def refuse_empty(left_out: LeftOut, source: str, unit: str, languages: Sequence[str]) -> None:
    """Raise `UserError` for rows of which a text is empty."""
    if left_out.count:
        rows = listed(unit, left_out.first, left_out.count)
        counted = " Rows are counted from 0." if unit == "row" else ""
        raise UserError(
            f"{source}, {rows}: the text in {' or '.join(languages)} is empty. Give it, take these {unit}s out, or "
            f"have them left out and counted: data.corpus.skip_incomplete=true.{counted}"
        )


def listed(unit: str, numbers: Sequence[int], count: int) -> str:
    """`line 2`, `lines 2 and 5`, or `lines 2, 5 and 7 more`: the first numbers of so many."""
    names = [str(number) for number in numbers]
    if count > len(names):
        names.append(f"{count - len(names)} more")
    first, last = ", ".join(names[:-1]), names[-1]
    return f"{unit}s {first} and {last}" if first else f"{unit} {last}"


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing."""
    close = difflib.get_close_matches(wrong, list(known), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _as_rows(texts: Callable[[], Iterator[str]]) -> Iterator[dict[str, str]]:
    return ({"text": text} for text in texts())


def _sides(parts: Sequence[Part]) -> dict[str, list[Texts]]:
    """The corpora of each language. One that stands in several parts, alone or beside others, is taken once."""
    found: dict[str, dict[str, Texts]] = {}
    for part in parts:
        for language, corpus in zip(part.languages, part.corpora, strict=True):
            whole: Texts = corpus.alone() if isinstance(corpus, Side) else corpus
            found.setdefault(language, {}).setdefault(whole.fingerprint(), whole)
    return {language: list(corpora.values()) for language, corpora in found.items()}


def _training(corpora: Sequence[Texts]) -> Iterator[str]:
    for corpus in corpora:
        for batch in corpus.rows("train").iter(batch_size=256):
            yield from (text for text in batch["text"] if text)
