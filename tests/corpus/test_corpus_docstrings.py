"""Docstrings as summarization pairs: what is taken, splits that share nothing and do not move, and clear errors."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmexp.contracts import Split, UserError
from lmexp.corpus import docstrings
from lmexp.corpus.docstrings import Docstrings

PROSE = "This is text of more than twenty words, as many as a body needs at least, and it says nothing about others."
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write(root: Path, modules: Mapping[str, Sequence[str]]) -> Path:
    """A tree of modules, of functions with these docstrings."""
    for name, found in modules.items():
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = [f"def f{i}():\n    '''{text}'''\n" for i, text in enumerate(found)]
        path.write_text("\n".join(functions), encoding="utf-8")
    return root


def docstring(name: str, summary: str | None = None) -> str:
    """One that is taken, unlike those of other names in its words."""
    return f"{summary or f'Say the thing of {name}.'}\n\n{' '.join(f'{name}word{i}' for i in range(30))}."


def names_in(split: Split, count: int, prefix: str = "package.m") -> list[str]:
    """Names of modules that go to a split."""
    corpus = Docstrings(packages=("asyncio",))
    return [name for name in (f"{prefix}{i}" for i in range(400)) if corpus._split_of(name) == split][:count]


def tree(root: Path, prefix: str = "package.m") -> Path:
    """Three modules in each split, of two docstrings each."""
    names = [name for split in SPLITS for name in names_in(split, 3, prefix)]
    return write(root, {name: [docstring(f"{name.replace('.', '')}x{i}") for i in range(2)] for name in names})


def texts(corpus: Docstrings, split: Split) -> list[tuple[str, str]]:
    bodies, summaries = (side.rows(split)["text"][:] for side in corpus.parts()[0].corpora)
    return list(zip(bodies, summaries, strict=True))


def taken(root: Path, text: str, **options: Any) -> tuple[str, str] | None:
    """Body and summary of what is made of one docstring."""
    write(root, {"a": [text], "b": [docstring("other")]})
    *found, other = Docstrings(roots=(str(root),), validation=0, test=0, **options).pairs["train"]
    assert other.summary == "Say the thing of other."
    return (found[0].body, found[0].summary) if found else None


def test_one_part_of_two_languages(tmp_path: Path) -> None:
    corpus = Docstrings(roots=(str(tree(tmp_path / "r")),), cache_dir=str(tmp_path / "c"))
    (part,) = corpus.parts()
    assert (part.name, part.languages, corpus.languages) == ("body-summary", ("body", "summary"), ("body", "summary"))
    assert (corpus.alpha, corpus.streaming, corpus.splits) == (1.0, False, SPLITS)
    for split in SPLITS:
        found = texts(corpus, split)
        assert len(found) == 6
        for body, summary in found:
            assert body.startswith(f"{summary.split()[-1][:-1]}word0 "), "a body stands beside its summary"
    assert len(corpus.rows("train")) == 12, "as texts of any language"


def test_bodies_are_tidied_and_summaries_one_line(tmp_path: Path) -> None:
    text = f"""
    Add one
    to   another.

    {PROSE}

    Parameters
    ----------
    a :  int
        One\tof them.



    b : int
    """
    assert taken(tmp_path, text) == (
        f"{PROSE}\n\nParameters\na : int\nOne of them.\n\nb : int",
        "Add one to another.",
    )


@pytest.mark.parametrize(
    ("summary", "good"),
    [
        ("Add two numbers", True),
        ("Return the (first) e.g. of it, etc. or 3.5 of them.", True),
        ("`add` of two numbers, or more!", True),
        ("Call foo(a) -> b of it.", True),
        (" ".join(["word"] * 30), True),
        (" ".join(["word"] * 31), False),
        ("Add numbers.", False),
        ("Add two numbers. Return their sum.", False),
        ("Add two numbers. return their sum.", False),
        ("Add numbers of these kinds:", False),
        ("add(a, b, c, d) -> the sum of them", False),
        ("Copyright 2020 by the authors of it.", False),
        ("%(name)s adds two numbers of it.", False),
        ("Add two numbers\n===============", False),
        (":param a: one of the two numbers", False),
        (">>> add(1, 2, 3) of it", False),
        ("Größe äöü ÄÖÜ ßßß of it.", False),
        ("1 2 3 4 5", False),
        ("A + B = C + D", True),
        ("A + (1 - 2)", False),
    ],
)
def test_what_is_a_summary(tmp_path: Path, summary: str, good: bool) -> None:
    found = taken(tmp_path, f"{summary}\n\n{PROSE}")
    assert found == ((PROSE, summary) if good else None)


@pytest.mark.parametrize(
    ("body", "good"),
    [
        (PROSE, True),
        ("Twelve words are too few to be the body of a summary.", False),
        (f"Parameters\n----------\na : int\n    {PROSE}", False),
        (f"Parameters\n==========\na : int\n\nNotes\n=====\n{PROSE}", True),
        (f"Args:\n    a: {PROSE}\n    b: {PROSE}", False),
        (f"Args:\n    a: One.\n\n{PROSE}", True),
        (f":param a: {PROSE}\n    {PROSE}\n:returns: {PROSE}", False),
        (f"@param a: {PROSE}", False),
        (f".. note:: {PROSE}\n   {PROSE}", False),
        (f">>> add(1, 2)\n{PROSE}", False),
        (f"{PROSE}\n\n>>> add(1, 2)\n3", True),
        (f"{PROSE}\n\n>>> add(1, 2)\n" + "3 " * 40, False),
        (f"{PROSE}\n\n```python\n\n" + "x = 1\n" * 40 + "```", False),
        (f"```\n{PROSE}\n```", False),
        (f"Like this::\n\n    {PROSE}\n\nand so on.", False),
        (f"{PROSE}\n\n.. code-block:: python\n\n    " + "x = 1; " * 40, False),
        (f"{PROSE} ä", True),
        (f"{PROSE} ä ö ü Ä", False),
        (f"{PROSE} \\x07", False),
        (f"{PROSE} Copyright (c) 2020 by us.", False),
    ],
)
def test_what_is_a_body(tmp_path: Path, body: str, good: bool) -> None:
    assert (taken(tmp_path, f"Add two numbers.\n\n{body}") is not None) == good


def test_bounds_can_be_set(tmp_path: Path) -> None:
    text = "Add these five numbers to it.\n\nFive words are here now."
    assert taken(tmp_path, text) is None
    assert taken(tmp_path, text, min_body_words=5) is not None
    assert taken(tmp_path, text, min_body_words=6) is None
    assert taken(tmp_path, text, min_body_words=5, max_summary_words=5) is None


def test_which_files_are_read(tmp_path: Path) -> None:
    bad = ("package.tests.bad", "package._vendor.bad", "package.test_bad", "package.conftest", "no-name")
    write(tmp_path, {name: [docstring("bad", f"Say it from {name}.")] for name in bad})
    write(tmp_path, {"package.good": [docstring("good")]})
    function = f"def f():\n    '''{docstring('more')}'''\n"
    (tmp_path / "broken.py").write_text(function + "def g(:\n")
    (tmp_path / "made.py").write_text("# This file was automatically generated.\n" + function)
    (tmp_path / "text.txt").write_text(function)
    (tmp_path / "one.py").write_text(
        f"""'''{docstring("module")}'''
class A:
    '''{docstring("class")}'''
    async def f(self):
        '''{docstring("method")}'''
        def g():
            '''{docstring("inner")}'''
"""
    )
    pairs = Docstrings(roots=(str(tmp_path),), validation=0, test=0).pairs["train"]
    assert [(made.module, made.summary.split()[-1]) for made in pairs] == [
        ("one", "module."),
        ("one", "class."),
        ("one", "method."),
        ("package.good", "good."),
    ]
    only = Docstrings(packages=("package",), roots=(str(tmp_path),), validation=0, test=0)
    assert [made.module for made in only.pairs["train"]] == ["package.good"]


def test_repeated_texts_stand_once_or_in_no_split(tmp_path: Path) -> None:
    first, second = names_in("train", 2)
    (test,) = names_in("test", 1)
    root = write(
        tmp_path,
        {
            first: [docstring("one"), docstring("two", "Say it again."), docstring("three", "Say it in both.")],
            second: [docstring("one", "Say that again."), docstring("four", "Say it, AGAIN!"), docstring("five")],
            test: [docstring("six", "Say it in both!"), docstring("five", "Say five again."), docstring("seven")],
        },
    )
    pairs = Docstrings(roots=(str(root),)).pairs
    assert [made.summary for made in pairs["train"]] == ["Say the thing of one.", "Say it again."]
    assert [made.summary for made in pairs["test"]] == ["Say the thing of seven."]


def test_near_copies_leave_evaluation(tmp_path: Path) -> None:
    (train,), (validation,), (test,) = (names_in(split, 1) for split in SPLITS)

    def saying(summary: str, start: int, end: int, other: str) -> str:
        shared = [f"word{i}" for i in range(start, end)]
        return f"{summary}\n\n{' '.join([*shared, *(f'{other}{i}' for i in range(30))])}"

    root = write(
        tmp_path,
        {
            train: [saying("Say this to train.", 0, 60, "one"), saying("Say nearly this.", 0, 60, "two")],
            validation: [saying("Nearly that of training.", 20, 60, "three"), saying("A new one.", 100, 160, "four")],
            test: [
                saying("Nearly that of validation.", 100, 140, "five"),
                saying("Only some words of training.", 45, 59, "six"),  # 7 of 37 runs
                saying("A new one of test.", 200, 260, "seven"),
                saying("Nearly the same of test.", 200, 260, "eight"),
            ],
        },
    )
    pairs = Docstrings(roots=(str(root),)).pairs
    assert {split: [made.summary for made in some] for split, some in pairs.items()} == {
        "train": ["Say this to train.", "Say nearly this."],
        "validation": ["A new one."],
        "test": ["Only some words of training.", "A new one of test.", "Nearly the same of test."],
    }


def test_other_packages_move_nothing_from_split_to_split(tmp_path: Path) -> None:
    one = tree(tmp_path / "a")
    two = tree(tmp_path / "b", "another.m")
    copies = sorted(one.rglob("*.py"))
    for number, path in enumerate(copies):  # to all splits
        shutil.copy(path, two / "another" / f"{names_in(SPLITS[number % 3], 9, 'another.copy')[number][8:]}.py")
    before = Docstrings(roots=(str(one),)).pairs
    after = Docstrings(roots=(str(two), str(one))).pairs
    assert sum(map(len, before.values())) == 18
    assert 18 < sum(map(len, after.values())) < 36
    for split in SPLITS:
        others = {text for other in SPLITS if other != split for made in after[other] for text in made[1:]}
        assert not others & {text for made in before[split] for text in made[1:]}


def test_it_is_the_same_every_time_and_anywhere(tmp_path: Path) -> None:
    root = tree(tmp_path / "a")
    shutil.copytree(root, tmp_path / "b")
    corpus = Docstrings(roots=(str(root),))
    code = (
        "import sys, json; from lmexp.corpus.docstrings import Docstrings; c = Docstrings(roots=(sys.argv[1],)); "
        "print(json.dumps([c.fingerprint(), c.pairs]))"
    )
    for seed in "12":
        run = [sys.executable, "-c", code, str(tmp_path / "b")]
        out = subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        assert json.loads(out) == json.loads(json.dumps([corpus.fingerprint(), corpus.pairs]))
    for option, value in (("validation", 0.1), ("min_body_words", 19), ("max_summary_words", 29)):
        options: Any = {option: value}
        assert Docstrings(roots=(str(root),), **options).fingerprint() != corpus.fingerprint()
    path = next((tmp_path / "b").rglob("*.py"))
    path.write_text(path.read_text().replace("word1", "word"))
    assert Docstrings(roots=(str(tmp_path / "b"),)).fingerprint() != corpus.fingerprint()


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"roots": (str(tree(tmp_path / "a")),), "cache_dir": str(tmp_path / "c")}
    first = [texts(Docstrings(**options), split) for split in SPLITS]
    monkeypatch.setattr(docstrings, "_docstrings", lambda sources: pytest.fail("reads again"))
    assert [texts(Docstrings(**options), split) for split in SPLITS] == first


def test_mistakes(tmp_path: Path) -> None:
    tree(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    mistakes: tuple[tuple[Any, str], ...] = (
        ({"validation": 0.6, "test": 0.4}, r"corpus.validation=0.6"),
        ({"test": -0.1}, r"corpus.test=-0.1"),
        ({"min_body_words": 0}, "corpus.min_body_words=0"),
        ({"max_summary_words": 2}, "corpus.max_summary_words=2"),
        ({"packages": "torch"}, r"corpus.packages='torch'; expected a list"),
        ({"packages": []}, r"corpus.packages=\[\]"),
        ({"packages": ["asyncoi"]}, "Did you mean 'asyncio'"),
        ({"packages": ["stdlib"], "roots": [str(tmp_path / "a")]}, "there is no 'stdlib'"),
        ({"roots": [str(tmp_path / "none")]}, "there is no folder"),
    )
    for options, said in mistakes:
        with pytest.raises(UserError, match=said):
            Docstrings(**options).fingerprint()
    with pytest.raises(UserError, match="no Python sources"):
        Docstrings(roots=(str(tmp_path / "empty"),)).fingerprint()
    with pytest.raises(UserError, match=r"no test split.*corpus.test=0.05"):
        texts(Docstrings(roots=(str(tmp_path / "a"),), test=0), "test")
    lonely = write(tmp_path / "b", {names_in("train", 1)[0]: [docstring("one")]})
    bodies = Docstrings(roots=(str(lonely),), cache_dir=str(tmp_path / "c")).parts()[0].corpora[0]
    assert len(bodies.rows("train")) == 1
    with pytest.raises(UserError, match="falls into the test split"):
        bodies.rows("test")


@pytest.fixture(scope="module")
def real() -> Docstrings:
    """Of what is installed wherever lmexp is."""
    return Docstrings(packages=("stdlib", "torch", "lightning", "datasets", "numpy"))


def test_what_is_installed_is_enough(real: Docstrings) -> None:
    sizes = {split: len(some) for split, some in real.pairs.items()}
    assert sum(sizes.values()) > 3000
    assert min(sizes["validation"], sizes["test"]) > 100
    packages = {made.module.partition(".")[0] for made in real.pairs["train"]}
    assert {"asyncio", "torch", "lightning", "datasets", "numpy"} <= packages


def test_its_pairs_are_what_python_says(real: Docstrings) -> None:
    summary, _, body = (inspect.getdoc(textwrap.dedent) or "").partition("\n\n")
    found = {made.summary: made.body for some in real.pairs.values() for made in some}
    assert found[summary].split() == body.split()
    for summary, body in found.items():
        assert 3 <= len(summary.split()) <= 30
        assert "\n" not in summary
        assert body == body.strip()
        assert "  " not in body
        assert "\n\n\n" not in body


def test_its_splits_share_nothing(real: Docstrings) -> None:
    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def runs(body: str) -> set[str]:
        said = words(body)
        return {" ".join(said[i : i + 8]) for i in range(len(said) - 7)}

    for text in ("body", "summary"):
        found = [tuple(words(getattr(made, text))) for some in real.pairs.values() for made in some]
        assert len(set(found)) == len(found)
    seen: set[str] = set()
    modules: set[str] = set()
    for split in SPLITS:
        assert not modules & {made.module for made in real.pairs[split]}
        shares = [len(runs(made.body) & seen) / len(runs(made.body)) for made in real.pairs[split]]
        assert max(shares) < 0.2
        seen |= {run for made in real.pairs[split] for run in runs(made.body)}
        modules |= {made.module for made in real.pairs[split]}


def test_it_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, lmexp.corpus.docstrings; print({'torch', 'datasets', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
