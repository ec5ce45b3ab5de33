"""The embedded summarization corpus: docstrings of what is installed, each body beside its summary line."""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import content_hash, split_of, splits_of
from lmexp.corpus.parts import Part, Parted, did_you_mean, pair, rows_of

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 1  # of how pairs are made below; a change makes new fingerprints
_SKIPPED = {  # tests, copies of other packages, and what is not the library itself
    *("test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    *("_vendor", "vendor", "_vendored", "vendored", "third_party", "extern", "externals", "_distutils"),
    *("__pycache__", "__phello__"),
}
_STDLIB = "stdlib"
_TEST = re.compile(r"test_\w+|\w+_test|conftest")
_GENERATED = re.compile(rb"auto(matically)?[- ]?generated|generated (by|from)|do not edit", re.IGNORECASE)
_HEADER = 2000  # bytes that say so

_TABLES = {  # headings of sections that list rather than tell
    *("args", "arguments", "parameters", "params", "other parameters", "keyword args", "keyword arguments", "kwargs"),
    *("input", "inputs", "output", "outputs", "returns", "return", "yields", "receives", "raises", "warns", "shape"),
    *("attributes", "methods", "see also", "references", "usage", "example", "examples"),
}
_CODE_DIRECTIVE = re.compile(r"\.\. *(code|code-block|sourcecode|plot|math|testcode|doctest|ipython)::")
_FIELD = re.compile(r":[a-z]+( [^:]*)?:(\s|$)|@(param|return|type|rtype|raise)")
_UNDERLINE = re.compile(r"([-=~^*#+\"])\1{2,}")
_WORD = re.compile(r"[A-Za-z]{2,}")
_PARAGRAPHS = re.compile(r"\n\s*\n")

_SUMMARY_START = re.compile(r"[A-Za-z`'\"(]")
_SENTENCE_GOES_ON = re.compile(r"(?<!\.\w)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?]\W*\s+\S")
_NO_SUMMARY = re.compile(
    r"copyright|licen[sc]e|%\(|"  # legal notes; templates that are filled in at run time
    r"^[\w.]+\(.*\)( *->.*)?\.?$|"  # signatures of functions in C
    r"^\W*(args|arguments|parameters|returns?|raises|usage|examples?|notes?|see also)\W*$",
    re.IGNORECASE,
)
_LEGAL = re.compile(r"copyright (\(c\)|\d{4})|permission is hereby granted|licensed under", re.IGNORECASE)

_FOREIGN = 0.03  # of the characters at most are not ASCII
_RUN = 8  # words
_COPIED = 0.2  # of the runs of a body, from which on it is a near-copy

Kind = Literal["prose", "table", "code", "heading"]


class Pair(NamedTuple):
    """A docstring in two."""

    module: str
    """The dotted name of the module it stands in."""

    body: str
    """All after the first paragraph."""

    summary: str
    """The first paragraph, on one line."""


@dataclass
class Docstrings(Parted):
    """What modules, classes, functions and methods say of themselves: the body is the source, the summary the target.

    Read through `ast`, without importing, from the standard library and the packages installed beside it, save tests,
    generated sources and vendored copies. About 10,000 pairs from what lmexp needs to run, more with Transformers and
    the like, of 150 words in a body and 9 in a summary on average. A docstring is taken if

    - its first paragraph is one sentence of 3 to `max_summary_words` words, and not a heading, a signature, a
      template or a legal note;
    - its body has `min_body_words` words of prose: outside of lists of parameters and the like, of references, code
      and doctests; at most half of its words are code;
    - no more than 3 % of the characters of either are other than ASCII, and all are printable.

    Bodies keep their lines; indentation, runs of blanks, underlines and repeated empty lines go.

    A module goes to a split by the hash of its dotted name, whatever else is installed. Of texts that differ in case
    and punctuation at most, those in one split stand once, those in several in none. A validation or test body of
    whose runs of 8 words a fifth or more stand in an earlier split is left out, too: so another package may add pairs
    and take some away, but moves none from one split to another.
    """

    packages: tuple[str, ...] | None = None
    """Top-level names to take, such as `torch`, `stdlib` for the whole standard library; None: all. With these named,
    what else is installed changes nothing."""

    roots: tuple[str, ...] | None = None
    """Folders that packages stand in; None: the standard library and site-packages."""

    min_body_words: int = 20
    """Words of prose in a body at least; at least 1."""

    max_summary_words: int = 30
    """Words of a summary at most; at least 3."""

    validation: float = 0.05
    """Fraction of the modules in the validation split; in [0, 1)."""

    test: float = 0.05
    """Fraction of the modules in the test split; in [0, 1), below 1 with `validation`."""

    cache_dir: str | None = None
    """Where content hashes and rows are kept; None: hashes are not kept, rows in the cache of `datasets`."""

    languages = ("body", "summary")
    alpha = 1.0

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise UserError(
                f"corpus.validation={self.validation} and corpus.test={self.test}: expected fractions from 0 on that "
                "leave something to train on; for example corpus.validation=0.05 corpus.test=0.05."
            )
        for name, least in (("min_body_words", 1), ("max_summary_words", 3)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"corpus.{name}={value}; expected a whole number of at least {least}.")
        self.roots = _names("roots", self.roots, "'data.corpus.roots=[FOLDER]'")
        for root in self.roots or ():
            if not Path(root).expanduser().is_dir():
                raise UserError(f"corpus.roots: there is no folder {root}; expected those that packages stand in.")
        self.packages = _names("packages", self.packages, "data.corpus.packages=[stdlib,torch]")

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are."""
        return splits_of(self.validation, self.test)

    def parts(self) -> list[Part]:
        """One: bodies beside summaries."""
        return [pair(self, "body", "summary")]

    def content_fingerprint(self) -> str:
        """sha256 over the names and contents of the sources and how pairs are made of them."""
        return self._fingerprint

    def left_out(self, split: Split, language: str, beside: tuple[str, ...]) -> int:
        """None: no row lacks a text."""
        return 0

    def rows_in(self, split: Split, language: str, beside: tuple[str, ...]) -> Dataset:
        """The bodies or the summaries of a split, in the order of their modules; none is empty."""
        if split not in self.splits:
            raise UserError(
                f"Docstrings has no {split} split; it has {', '.join(self.splits)}. Set corpus.{split}=0.05."
            )
        key = hashlib.sha256(f"{self.content_fingerprint()} {split} {language}".encode()).hexdigest()
        return rows_of(partial(self._column, split, language), key, self.cache_dir)

    @cached_property
    def pairs(self) -> dict[Split, list[Pair]]:
        """The pairs of each split, sorted by module and in the order of the source, made at first use."""
        found: dict[Split, list[Pair]] = {split: [] for split in self.splits}
        for module, docstring in _docstrings(self._sources):
            if made := self._pair(module, docstring):
                found[self._split_of(module)].append(made)
        return _without_near_copies(_without_repeated(found))

    @cached_property
    def _folders(self) -> list[Path]:
        if self.roots is not None:
            return [Path(root).expanduser() for root in self.roots]
        paths = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
        return [Path(path) for path in paths if Path(path).is_dir()]

    @cached_property
    def _sources(self) -> list[tuple[str, Path]]:
        """(dotted module name, path), sorted by name; of two of a name the one that would be imported."""
        known = {name for root in self._folders for name in _packages(root)}
        if self.roots is None:
            known.add(_STDLIB)
        for name in self.packages or ():
            if name not in known:
                raise UserError(
                    f"corpus.packages: there is no {name!r} in {' or '.join(map(str, self._folders))}."
                    f"{did_you_mean(name, known)} Expected top-level names as they are imported; null takes all."
                )
        found: dict[str, Path] = {}
        for root in self._folders:
            taken = self.packages
            if taken and _STDLIB in taken and str(root) == sysconfig.get_path("stdlib"):
                taken = None
            for name, path in _modules(root):
                if taken is None or name.partition(".")[0] in taken:
                    found.setdefault(name, path)
        if not found:
            raise UserError(
                f"There are no Python sources in {' or '.join(map(str, self._folders))}; expected some to read "
                "docstrings in. Name folders of packages: 'data.corpus.roots=[FOLDER]'."
            )
        return sorted(found.items())

    @cached_property
    def _fingerprint(self) -> str:
        options = [self.min_body_words, self.max_summary_words, self.validation, self.test]
        names = [name for name, _ in self._sources]
        content = content_hash([path for _, path in self._sources], self.cache_dir)
        return hashlib.sha256(json.dumps([_VERSION, options, names, content]).encode()).hexdigest()

    def _column(self, split: Split, language: str) -> Iterator[str]:
        if not self.pairs[split]:
            where = ", ".join(self.packages or map(str, self._folders))
            raise UserError(
                f"No docstring of {where} falls into the {split} split; expected at least one. Take more packages: "
                f"data.corpus.packages=null, or a larger data.corpus.{split}."
            )
        yield from (getattr(made, language) for made in self.pairs[split])

    def _pair(self, module: str, docstring: str) -> Pair | None:
        """None unless it can be taken."""
        paragraph, whole = _PARAGRAPHS.split(docstring, maxsplit=1)
        summary = _summary(paragraph, self.max_summary_words)
        if summary is None or not self._has_prose(whole) or _LEGAL.search(whole):
            return None
        body = _tidied(whole)
        for text in (summary, body):
            foreign = len(text) - len(text.encode("ascii", "ignore"))
            if foreign > _FOREIGN * len(text) or not text.replace("\n", "").isprintable():
                return None
        return Pair(module, body, summary)

    def _has_prose(self, body: str) -> bool:
        prose = code = words = 0
        for kind, line in _kinds(body):
            words += len(line.split())
            if kind == "prose":
                prose += len(_WORD.findall(line))
            elif kind == "code":
                code += len(line.split())
        return prose >= self.min_body_words and code <= words / 2

    def _split_of(self, module: str) -> Split:
        return split_of(module, self.validation, self.test)


def _names(key: str, names: Sequence[str] | None, example: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not names:
        raise UserError(f"corpus.{key}={names!r}; expected a list of at least one, or null: {example}.")
    return tuple(names)


def _packages(root: Path) -> Iterator[str]:
    """Top-level names in a folder."""
    for path in root.iterdir():
        name = path.name.removesuffix(".py")
        if name.isidentifier() and name not in _SKIPPED and (path.is_dir() or path.suffix == ".py"):
            yield name


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of the modules under a folder."""
    for folder, subfolders, files in os.walk(root):
        # names such as site-packages or torch-2.13.dist-info are no packages
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _SKIPPED]
        package = Path(folder).relative_to(root).parts
        for file in files:
            name = file.removesuffix(".py")
            if name != file and name.isidentifier() and not _TEST.fullmatch(name):
                yield ".".join((*package, name) if name != "__init__" else package), Path(folder, file)


def _docstrings(sources: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """(module, docstring) of all that has a second paragraph."""
    collecting = gc.isenabled()
    gc.disable()  # trees hold no cycles, and looking for some takes a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others' escape sequences
            for module, path in sources:
                source = path.read_bytes()
                if b'"""' not in source and b"'''" not in source:  # parsing is what takes the time
                    continue
                if _GENERATED.search(source[:_HEADER]):  # out of other sources, or tables
                    continue
                try:
                    tree = ast.parse(source)
                except (SyntaxError, ValueError, RecursionError):  # templates and the like are no modules
                    continue
                yield from ((module, text) for text in _docstrings_in(tree))
    finally:
        if collecting:
            gc.enable()


def _docstrings_in(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text and _PARAGRAPHS.search(text.strip()):  # cleaning takes long, too
        yield inspect.cleandoc(text)
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _docstrings_in(child)


def _summary(paragraph: str, most: int) -> str | None:
    """It on one line, or None unless it is a summary."""
    if any(_UNDERLINE.fullmatch(line.strip()) for line in paragraph.split("\n")):
        return None
    text = " ".join(paragraph.split())
    words = len(text.split())
    if not 3 <= words <= most or len(re.findall("[A-Za-z]+", text)) < 3:
        return None
    if not _SUMMARY_START.match(text) or text.endswith((":", ",")):
        return None
    return None if _SENTENCE_GOES_ON.search(text) or _NO_SUMMARY.search(text) else text


def _tidied(body: str) -> str:
    lines = [" ".join(line.split()) for line in body.split("\n")]
    text = "\n".join(line for line in lines if not _UNDERLINE.fullmatch(line))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _kinds(body: str) -> Iterator[tuple[Kind, str]]:
    """(what it is, line) of the lines of a body that have text, whether in the style of NumPy, Google or Sphinx."""
    lines = body.split("\n")
    section: Kind = "prose"  # what an underlined heading has begun
    block: Kind | None = None  # what the lines further in than `margin` are
    margin = 0
    fenced = session = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        title = text.rstrip(":").lower()
        if not text:
            session = False
            continue
        if text.startswith("```"):
            fenced = not fenced
            yield "code", text
        elif fenced or session or text.startswith(">>>"):
            session = not fenced
            yield "code", text
        elif block and indent > margin:
            yield block, text
        elif _UNDERLINE.fullmatch(text):
            yield "heading", text
        elif _UNDERLINE.fullmatch(following.strip()):
            section, block = ("table" if title in _TABLES else "prose"), None
            yield "heading", text
        elif text.endswith(":") and title in _TABLES:
            block, margin = "table", indent
            yield "heading", text
        elif _FIELD.match(text) or text.startswith(".. "):
            block, margin = ("code" if _CODE_DIRECTIVE.match(text) else "table"), indent
            yield block, text
        else:
            block, margin = ("code" if text.endswith("::") else None), indent
            yield section, text


def _key(text: str) -> str:
    """What texts that are the same but for case and punctuation have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _without_repeated(pairs: dict[Split, list[Pair]]) -> dict[Split, list[Pair]]:
    """Those whose texts stand in no other split, the first of each."""
    keyed = {split: [(made, _key(made.body), _key(made.summary)) for made in some] for split, some in pairs.items()}
    homes: dict[str, set[Split]] = {}
    for split, some in keyed.items():
        for _, *keys in some:
            for key in keys:
                homes.setdefault(key, set()).add(split)
    kept: dict[Split, list[Pair]] = {split: [] for split in pairs}
    seen: set[str] = set()
    for split, some in keyed.items():
        for made, *keys in some:
            if seen.isdisjoint(keys) and all(len(homes[key]) == 1 for key in keys):
                seen.update(keys)
                kept[split].append(made)
    return kept


def _without_near_copies(pairs: dict[Split, list[Pair]]) -> dict[Split, list[Pair]]:
    """Without the validation and test pairs whose bodies repeat those of a split before theirs; training keeps all."""
    evaluated = {run for split, some in pairs.items() if split != "train" for made in some for run in _runs(made.body)}
    earlier: set[tuple[str, ...]] = set()
    kept: dict[Split, list[Pair]] = {}
    for split, some in pairs.items():  # training first
        kept[split] = [made for made in some if not earlier or _share(_runs(made.body), earlier) < _COPIED]
        for made in some:
            earlier.update(evaluated.intersection(_runs(made.body)))  # the others are never asked for
    return kept


def _runs(body: str) -> set[tuple[str, ...]]:
    words = _key(body).split()
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


def _share(runs: set[tuple[str, ...]], earlier: set[tuple[str, ...]]) -> float:
    return len(runs & earlier) / max(1, len(runs))
