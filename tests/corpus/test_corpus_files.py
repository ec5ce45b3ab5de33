"""Local files: each kind, unit and split against hand-made files; each thing that can be wrong with them."""

from __future__ import annotations

import functools
import gzip
import json
import operator
import os

import pytest
from datasets import Dataset

from lmexp.contracts import UserError
from lmexp.corpus import content
from lmexp.corpus.files import Files

TEXTS = ["one\n", 'two, "quoted"\nand a line', "drei ß ☃", "four\tfive"]


def read(path, split="train", cache_dir=None, **options):
    options = {"validation_fraction": 0.0, **options}
    rows = Files(path=str(path), cache_dir=cache_dir, **options).rows(split)
    assert isinstance(rows, Dataset)
    return rows["text"][:]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write_table(folder, kind):
    path = folder / f"rows.{kind}"
    dataset = Dataset.from_dict({"id": list(range(len(TEXTS))), "body": TEXTS})
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "csv":
        dataset.to_csv(path)
    elif kind == "tsv":
        dataset.to_csv(path, sep="\t")
    else:
        dataset.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("zipped", [False, True])
def test_tables_written_by_datasets_come_back(tmp_path, kind, zipped):
    path = write_table(tmp_path, kind)
    if zipped:
        packed = tmp_path / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert read(path, field="body") == TEXTS
    with pytest.raises(UserError, match=r"no column 'text'; it has 'id', 'body'.*corpus.field"):
        read(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_units_of_text(tmp_path, zipped):
    text = "a b\nc\n\n \nd\n\n\ne ☃\n"
    path = tmp_path / ("t.txt.gz" if zipped else "t.txt")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert read(path) == [text]
    assert read(path, unit="line") == ["a b", "c", "d", "e ☃"]
    assert read(path, unit="paragraph") == ["a b\nc", "d", "e ☃"]
    with pytest.raises(UserError, match=r"unit=row.*file, line or paragraph"):
        read(path, unit="row")


def test_globs_and_lists(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(tmp_path / "*.txt") == ["a", "b", "c"]
    files = Files(path=[str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")], validation_fraction=0.0)
    assert files.rows("train")["text"][:] == ["c", "a", "b"]


def test_tail_is_the_customary_cut(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1003)) + "☃" * 10
    path = tmp_path / "input.txt"
    path.write_text(text)
    files = Files(path=str(path), by="tail", validation_fraction=0.1)
    n = len(text)
    assert files.splits == ("train", "validation")
    assert files.rows("train")["text"][:] == [text[: int(n * 0.9)]]
    assert files.rows("validation")["text"][:] == [text[int(n * 0.9) :]]
    three = Files(path=str(path), by="tail", unit="line", validation_fraction=0.2, test_fraction=0.3)
    assert "".join(t for s in three.splits for t in three.rows(s)["text"]) == text


def test_hash_splits_are_a_partition_and_stable(tmp_path):
    lines = [f"line {i % 400}" for i in range(500)]
    path = tmp_path / "t.txt"
    path.write_text("\n".join(lines))
    options = {"unit": "line", "validation_fraction": 0.2, "test_fraction": 0.1}
    parts = {s: read(path, s, **options) for s in ("train", "validation", "test")}
    assert sorted(functools.reduce(operator.iadd, parts.values(), [])) == sorted(lines)
    assert not set(parts["train"]) & set(parts["validation"])
    assert 50 < len(parts["validation"]) < 150
    path.write_text("\n".join(reversed(lines)))
    assert sorted(read(path, "validation", **options)) == sorted(parts["validation"])


def test_explicit_splits(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = Files(train=str(tmp_path / "train.txt"), test=str(tmp_path / "test.txt"))
    assert files.splits == ("train", "test")
    assert files.rows("test")["text"][:] == ["test"]
    with pytest.raises(UserError, match=r"no validation split.*corpus.validation="):
        files.rows("validation")


def test_fingerprint_is_of_the_content_and_cheap_again(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("same")
    prints = [Files(path=str(path), cache_dir=str(cache)).fingerprint() for path in paths]
    assert prints[0] == prints[1]
    assert Files(path=str(paths[0]), unit="line").fingerprint() != prints[0]

    def unread(path):
        raise AssertionError(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr(content, "_sha256", unread)
        assert Files(path=str(paths[0]), cache_dir=str(cache)).fingerprint() == prints[0]
    paths[0].write_text("emas")
    os.utime(paths[0], ns=(1, 1))
    assert Files(path=str(paths[0]), cache_dir=str(cache)).fingerprint() != prints[0]


def test_a_changed_file_gives_other_rows(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("before")
    assert read(path, cache_dir=str(tmp_path / "c")) == ["before"]
    path.write_text("after it")
    assert read(path, cache_dir=str(tmp_path / "c")) == ["after it"]


def broken(folder, kind):
    """A file that is wrong in one way, and what the message must say."""
    if kind == "missing":
        return folder / "no.txt", "no such file"
    if kind == "empty":
        (folder / "e.txt").write_text(" \n")
        return folder / "e.txt", "holds no text"
    if kind == "latin1":
        (folder / "l.txt").write_bytes("é".encode("latin1"))
        return folder / "l.txt", "not UTF-8.*iconv"
    if kind == "gz":
        content = gzip.compress(os.urandom(10_000).hex().encode())
        (folder / "t.txt.gz").write_bytes(content[: len(content) // 2])
        return folder / "t.txt.gz", "cut off"
    if kind == "not gz":
        (folder / "t.txt.gz").write_text("plain")
        return folder / "t.txt.gz", "gzip"
    if kind == "parquet":
        content = write_table(folder, "parquet").read_bytes()
        (folder / "rows.parquet").write_bytes(content[: len(content) // 2])
        return folder / "rows.parquet", "Parquet"
    if kind == "json":
        (folder / "j.jsonl").write_text(json.dumps({"text": "a"}) + "\n{")
        return folder / "j.jsonl", "line 2.*not JSON"
    (folder / "n.jsonl").write_text('{"text": 3}\n')
    return folder / "n.jsonl", "holds int"


@pytest.mark.parametrize("kind", ["missing", "empty", "latin1", "gz", "not gz", "parquet", "json", "number"])
def test_what_is_wrong_is_named(tmp_path, kind):
    path, message = broken(tmp_path, kind)
    with pytest.raises(UserError, match=rf"(?s){path.name}.*{message}|{message}.*{path.name}"):
        read(path)


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"data.corpus.path="):
        Files()
    with pytest.raises(UserError, match="exclude"):
        Files(path="a", train="b")
    with pytest.raises(UserError, match="fractions"):
        Files(path="a", validation_fraction=1.0)
    with pytest.raises(UserError, match="unit='word'"):
        Files(path="a", unit="word")


def test_a_split_that_gets_nothing_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    files = Files(path=str(tmp_path / "a.txt"), validation_fraction=0.4, test_fraction=0.3)
    with pytest.raises(UserError, match="by=tail"):
        [files.rows(split) for split in files.splits]
