"""Corpora of parts: aligned line by line, splits that share nothing, smoothed shares, and clear errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from lmexp.contracts import UserError
from lmexp.corpus.cldr import Cldr
from lmexp.corpus.files import Files
from lmexp.corpus.hub import HubTranslation
from lmexp.corpus.mixture import Mixture
from lmexp.corpus.parallel_files import ParallelFiles
from lmexp.corpus.parts import smoothed, smoothed_texts

LANGUAGES = ("en", "de", "ja")


def lines(corpus, split, language):
    part = next(part for part in corpus.parts() if part.languages == (language,))
    return part.corpora[0].rows(split)["text"][:]


@pytest.fixture(scope="module")
def cldr() -> Cldr:
    return Cldr(languages=LANGUAGES, pairs=(("en", "de"), ("en", "ja")), phrases=3000)


def test_cldr_shares_no_phrase_between_splits(cldr: Cldr) -> None:
    for language in LANGUAGES:
        train, validation, test = (set(lines(cldr, split, language)) for split in ("train", "validation", "test"))
        assert len(train) > 2000
        assert min(len(validation), len(test)) > 50
        assert not train & validation
        assert not train & test
        assert not validation & test


def test_cldr_is_parallel_line_by_line(cldr: Cldr) -> None:
    assert [part.name for part in cldr.parts()] == ["en", "de", "ja", "en-de", "en-ja"]
    for part in cldr.parts()[3:]:
        sides = [corpus.rows("validation")["text"][:] for corpus in part.corpora]
        assert len(sides[0]) == len(sides[1])
        assert all(text.strip() for side in sides for text in side)
        alone = [lines(cldr, "validation", language) for language in part.languages]
        assert sides == alone, "a pair is the two languages beside one another"
        # numbers written in digits stand on both sides
        digits = [sum(any(c.isdigit() for c in text) for text in side) for side in sides]
        assert digits[0] > 0.9 * digits[1] > 0


def test_cldr_is_the_same_every_time(cldr: Cldr) -> None:
    again = Cldr(languages=LANGUAGES, pairs=(("en", "de"), ("en", "ja")), phrases=3000)
    assert again.fingerprint() == cldr.fingerprint()
    assert lines(again, "test", "de") == lines(cldr, "test", "de")
    assert Cldr(languages=LANGUAGES, phrases=3000).fingerprint() != cldr.fingerprint()


def test_cldr_mistakes() -> None:
    for options, said in (
        ({"languages": ("en", "gemran")}, "gemran"),
        ({"languages": ("en",), "pairs": (("en", "de"),)}, "not in corpus.languages"),
        ({"pairs": (("en",),)}, "expected two languages"),
        ({"monolingual": False}, "has no text"),
        ({"alpha": 2}, "corpus.alpha=2"),
    ):
        with pytest.raises(UserError, match=said):
            Cldr(**options).parts()


ENGLISH = ["one house", "two houses", "", "four houses"]
GERMAN = ["ein Haus", "zwei Häuser", "drei Häuser", "vier Häuser"]


def forms(folder: Path) -> dict[str, object]:
    """The same text in every form there is."""
    files = {}
    for name, side in (("en", ENGLISH), ("de", GERMAN)):
        (folder / f"a.{name}").write_text("\n".join(side) + "\n", encoding="utf-8")
        files[name] = str(folder / f"a.{name}")
        with gzip.open(folder / f"z.{name}.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(side) + "\n")
    pairs = list(zip(ENGLISH, GERMAN, strict=True))
    (folder / "a.tsv").write_text("en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    (folder / "a.csv").write_text("id,en,de\n" + "".join(f'1,"{a}",{b}\n' for a, b in pairs), encoding="utf-8")
    rows = [{"translation": {"en": a, "de": b}} for a, b in pairs]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    zipped = {name: str(folder / f"z.{name}.gz") for name in files}
    return {"files": files, "gz": zipped} | {kind: str(folder / f"a.{kind}") for kind in ("tsv", "csv", "jsonl")}


@pytest.mark.parametrize("form", ["files", "gz", "tsv", "csv", "jsonl"])
def test_parallel_files_of_every_form(tmp_path: Path, form: str) -> None:
    source = forms(tmp_path)[form]
    options = {"languages": ("en", "de"), "use": "both", "cache_dir": str(tmp_path / "c")}
    corpus = ParallelFiles(train=source, skip_incomplete=True, **options)
    assert [part.name for part in corpus.parts()] == ["en", "de", "en-de"]
    sides = [side.rows("train")["text"][:] for side in corpus.parts()[2].corpora]
    assert sides == [["one house", "two houses", "four houses"], ["ein Haus", "zwei Häuser", "vier Häuser"]]
    assert lines(corpus, "train", "de") == GERMAN, "alone, a language keeps what has no translation"
    assert [side.left_out("train") for side in corpus.parts()[2].corpora] == [1, 1]
    number = 3 if form in ("files", "gz", "jsonl") else 4  # after the header
    refusing = ParallelFiles(train=source, **options).parts()[2]  # though the rows are in the cache
    for side in refusing.corpora:
        with pytest.raises(UserError, match=rf", line {number}: the text in en or de is empty.*skip_incomplete=true"):
            side.rows("train")


def test_what_is_left_out_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, every in (("en", 3), ("de", 5)):
        text = "".join("\n" if n % every == 0 else f"{name} {n}\n" for n in range(1, 100))
        (tmp_path / f"a.{name}").write_text(text)
    source = {name: str(tmp_path / f"a.{name}") for name in ("en", "de")}
    empty = [n for n in range(1, 100) if n % 3 == 0 or n % 5 == 0]
    with pytest.raises(UserError, match=rf"lines {', '.join(map(str, empty[:10]))} and {len(empty) - 10} more: the"):
        ParallelFiles(train=source, cache_dir=str(tmp_path / "c")).parts()[0].corpora[0].rows("train")
    corpus = ParallelFiles(train=source, skip_incomplete=True, cache_dir=str(tmp_path / "c"))
    sides = corpus.parts()[0].corpora
    assert [side.left_out("train") for side in sides] == [len(empty)] * 2
    assert all(len(side.rows("train")) == 99 - len(empty) for side in sides)
    (counted, *_) = (tmp_path / "c").rglob("*.left_out.json")
    counted.unlink()  # as in a cache of before
    assert [side.left_out("train") for side in sides] == [len(empty)] * 2
    monkeypatch.setattr(ParallelFiles, "_rows", None)  # from here on nothing is read
    assert [side.left_out("train") for side in sides] == [len(empty)] * 2
    with pytest.raises(UserError, match=r"corpus.skip_incomplete='drop'; expected true or false"):
        ParallelFiles(train=source, skip_incomplete="drop")


def test_parallel_files_mistakes(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\n")
    (tmp_path / "b.tsv").write_text("en\tfr\none\tun\n")
    uneven = {"en": str(tmp_path / "a.en"), "de": str(tmp_path / "a.de")}
    for options, said in (
        ({"train": uneven}, r"2.*1|1.*2"),
        ({"train": str(tmp_path / "b.tsv"), "languages": ("en", "de")}, "de"),
        ({"train": {"en": str(tmp_path / "none.en"), "de": str(tmp_path / "a.de")}}, "none.en"),
        ({"train": uneven, "use": "some"}, "corpus.use"),
        ({}, "corpus.train is not given"),
    ):
        with pytest.raises(UserError, match=said):
            [side.rows("train") for part in ParallelFiles(**options).parts() for side in part.corpora]


def test_hub_data_sets_with_a_column_of_translations(tmp_path: Path) -> None:
    rows = [{"en": a, "de": b} for a, b in zip(ENGLISH, GERMAN, strict=True)]
    Dataset.from_dict({"translation": rows}).to_parquet(str(tmp_path / "data" / "train-0.parquet"))
    corpus = HubTranslation(str(tmp_path / "data"), languages=("en", "de"), cache_dir=str(tmp_path / "c"))
    sides = [side.rows("train")["text"][:] for side in corpus.parts()[0].corpora]
    assert sides == [["one house", "two houses", "four houses"], ["ein Haus", "zwei Häuser", "vier Häuser"]]
    assert corpus.parts()[0].corpora[1].left_out("train") == 1
    strict = HubTranslation(
        str(tmp_path / "data"), languages=("en", "de"), skip_incomplete=False, cache_dir=corpus.cache_dir
    )
    with pytest.raises(UserError, match=r"'train' of .*, row 2: the text in en or de is empty.*counted from 0"):
        strict.parts()[0].corpora[0].rows("train")
    with pytest.raises(UserError, match="fr"):
        HubTranslation(str(tmp_path / "data"), languages=("en", "fr")).parts()[0].corpora[1].rows("train")


def test_mixtures_of_corpora_and_of_their_parts(tmp_path: Path) -> None:
    source = forms(tmp_path)["files"]
    pairs = ParallelFiles(train=source, skip_incomplete=True, cache_dir=str(tmp_path / "c"))
    single = Files(train=str(tmp_path / "a.de"), unit="line", cache_dir=str(tmp_path / "c"))
    mixed = Mixture({"old": single, "books": pairs}, languages={"old": "de"})
    assert [part.name for part in mixed.parts()] == ["old", "en-de"]
    assert mixed.languages == ("de", "en")
    assert mixed.splits == ("train",)
    with pytest.raises(UserError, match=r"corpus.parts is not given"):
        Mixture(None)
    with pytest.raises(UserError, match="two parts called en-de"):
        Mixture({"a": pairs, "b": pairs})


def test_smoothing_follows_the_formula(tmp_path: Path) -> None:
    assert smoothed([100, 1], 1) == pytest.approx([100 / 101, 1 / 101])
    assert smoothed([100, 1], 0.5) == pytest.approx([10 / 11, 1 / 11])
    assert smoothed([100, 1, 0], 0) == pytest.approx([0.5, 0.5, 0])
    (tmp_path / "en.txt").write_text("\n".join(f"line {i:05}" for i in range(2000)))
    (tmp_path / "de.txt").write_text("\n".join(f"Zeile {i:04}" for i in range(50)))
    parts = {
        n: Files(train=str(tmp_path / f"{n}.txt"), unit="line", cache_dir=str(tmp_path / "c")) for n in ("en", "de")
    }
    texts = list(smoothed_texts(Mixture(parts, alpha=0.5)))
    german = sum(len(text) for text in texts if text.startswith("Z"))
    total = sum(len(text) for text in texts)
    expected = smoothed([2000 * 10, 50 * 10], 0.5)[1]
    assert german / total == pytest.approx(expected, rel=0.01)


def test_hub_data_sets_with_a_column_for_each_text(tmp_path: Path) -> None:
    rows = {"article": ["a long text", "another", "  "], "highlights": ["long", "other", "none"], "id": [1, 2, 3]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
    options = {"column": None, "cache_dir": str(tmp_path / "c")}
    corpus = HubTranslation(str(tmp_path / "data"), languages=("article", "highlights"), **options)
    (part,) = corpus.parts()
    assert [side.rows("train")["text"][:] for side in part.corpora] == [["a long text", "another"], ["long", "other"]]
    with pytest.raises(UserError, match=r"has no column 'highlight'; it has 'article'.*Did you mean 'highlights'"):
        HubTranslation(str(tmp_path / "data"), languages=("article", "highlight"), **options).parts()[0].corpora[
            1
        ].rows("train")
