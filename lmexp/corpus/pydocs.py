"""The default corpus: the English of Python's own documentation, which every CPython carries."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import split_of, splits_of

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 1  # of how documents are made below; a change makes new fingerprints
_SKIPPED = {  # not the library itself, or tables rather than English
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__"),
}
_SHORT = 40  # characters; shorter paragraphs ("Usage:") may occur in many documents


@dataclass
class PyDocs:
    """pydoc's topics, and the docstrings of the standard library's modules, read through `ast` without importing.

    A document is a topic or a module, about 2 MB in all. A document goes to a split by the hash of its name, so
    that it stays there from one Python to the next. No paragraph of 40 characters or more stands in two documents:
    pydoc repeats chapters in their sections, and modules repeat one another's docstrings.
    """

    validation: float = 0.05
    """Fraction of the documents in the validation split; in [0, 1)."""

    test: float = 0.05
    """Fraction of the documents in the test split; in [0, 1), below 1 with `validation`."""

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise UserError(
                f"corpus.validation={self.validation} and corpus.test={self.test}: expected fractions from 0 on that "
                "leave something to train on; for example corpus.validation=0.05 corpus.test=0.05."
            )

    streaming = False

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are."""
        return splits_of(self.validation, self.test)

    def fingerprint(self) -> str:
        """sha256 over the sources that the documents are made of, and the fractions."""
        digest = hashlib.sha256(repr((_VERSION, self.validation, self.test)).encode())
        for name, path in _sources():
            source = path.read_bytes()
            digest.update(f"{name} {len(source)}\n".encode())
            digest.update(source)
        digest.update(_topics_path().read_bytes())
        return digest.hexdigest()

    def rows(self, split: Split) -> Dataset:
        """The documents of a split, in the order of their names, as `{"text": ...}`."""
        from datasets import Dataset

        if split not in self.splits:
            raise UserError(f"PyDocs has no {split} split; it has {', '.join(self.splits)}. Set corpus.{split}=0.05.")
        return Dataset.from_dict({"text": [text for name, text in self.documents if self._split_of(name) == split]})

    def _split_of(self, name: str) -> Split:
        return split_of(name, self.validation, self.test)

    @cached_property
    def documents(self) -> list[tuple[str, str]]:
        """(name, text) of all documents, sorted by name."""
        owners: dict[str, str] = {}  # paragraph -> the document that keeps it
        documents = []
        for name, parts in [*_topics(), *_modules()]:
            kept = [(heading, _drop_repeated(text, name, owners)) for heading, text in parts]
            sections = [f"{heading}\n\n{text}" if heading else text for heading, text in kept if text]
            if sections:
                documents.append((name, "\n\n".join([name.split(":")[1], *sections]) + "\n"))
        if not documents:
            raise UserError(
                f"This Python has no readable sources of its standard library in {_root()}, so there is no PyDocs "
                "corpus; use data=files data.corpus.path=FILE, or another build of Python."
            )
        return sorted(documents)


def _drop_repeated(text: str, document: str, owners: dict[str, str]) -> str:
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    kept = []
    for paragraph in paragraphs:
        key = " ".join(paragraph.split())
        if len(key) < _SHORT or owners.setdefault(key, document) == document:
            kept.append(paragraph.rstrip())
    # a heading or two whose text has gone is not worth a section
    return "\n\n".join(kept) if len(kept) * 2 > len(paragraphs) else ""


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics_path() -> Path:
    return _root() / "pydoc_data" / "topics.py"


def _topics() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """pydoc's topics, the longest first: chapters come before the sections that repeat them."""
    if not _topics_path().is_file():
        raise UserError(
            f"{_topics_path()} is missing: this Python came without pydoc's topics. Install its standard library whole "
            "(on Debian: libpython3-stdlib), or use data=files data.corpus.path=FILE."
        )
    from pydoc_data.topics import topics

    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        yield f"topic:{name}", [("", topics[name])]


def _sources() -> Iterator[tuple[str, Path]]:
    """(dotted module name, path) of the standard library's modules, sorted by name."""
    root = _root()
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED and not name.startswith("config-")]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                found.append((name, path))
    return iter(sorted(found))


def _modules() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for name, path in _sources():
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:  # parsing is what takes the time
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and the like are no modules
            continue
        yield f"module:{name}", list(_docstrings(tree, ""))


def _docstrings(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module or class and of what is defined in it, in the order of the source."""
    if text := ast.get_docstring(node):
        yield (f"class {prefix}" if prefix else ""), text
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(child)):
            names = [a.arg for a in [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]]
            qualified = f"{prefix}.{child.name}" if prefix else child.name
            yield f"{qualified}({', '.join(names)})", text
