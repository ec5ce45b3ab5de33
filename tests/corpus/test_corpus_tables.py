"""Tables of every kind against hand-made rows, and all that is wrong with one in one error, at its line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from lmexp.contracts import UserError
from lmexp.corpus.parallel_files import ParallelFiles
from lmexp.corpus.tables import BrokenRows, check_columns, found, kind_of, listed, table_rows, unit_of

ROWS = [{"id": "1", "body": "one"}, {"id": "2", "body": 'two, "quoted"'}, {"id": "3", "body": "drei ß \u2028 ☃"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write(folder: Path, kind: str, rows=ROWS) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "tsv":
        cells = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("".join("\t".join(row) + "\n" for row in cells), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def said(path: Path, columns=("body",), **options) -> str:
    """The error that reading the table ends in."""
    with pytest.raises(UserError) as raised:
        list(table_rows(path, list(columns), "Mend it.", **options))
    return str(raised.value)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("kind", "first"), [("csv", 2), ("tsv", 2), ("jsonl", 1), ("parquet", 0)])
def test_every_kind_gives_its_rows_with_their_numbers(tmp_path, kind, first, zipped):
    path = write(tmp_path, kind)
    if zipped:
        packed = tmp_path / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert kind_of(path) == kind
    assert unit_of(path) == ("row" if kind == "parquet" else "line")
    read = list(table_rows(path, ["id", "body"], ""))
    assert [number for number, _ in read] == [first, first + 1, first + 2]
    assert [dict(row) for _, row in read] == ROWS
    message = said(path, ["text", "bdy", "id"])
    assert f"{path} has no column 'text' and no 'bdy'; it has 'id', 'body'. Did you mean 'body'? Mend it." == message


def test_numbers_are_of_the_line_where_a_row_starts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n\n"x\ny",1\nz,2\n')
    assert list(table_rows(path, ["a"], "")) == [(3, {"a": "x\ny", "b": "1"}), (5, {"a": "z", "b": "2"})]
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"a": 1}\n \n{"b": null}\n')
    assert list(table_rows(path, ["a"], "")) == [(2, {"a": 1}), (4, {"b": None})]


def test_quotes_are_of_csv_unless_said(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('a\tb\n"x"\t1\n')
    assert [row["a"] for _, row in table_rows(path, ["a"], "")] == ['"x"']
    assert [row["a"] for _, row in table_rows(path, ["a"], "", quoted=True)] == ["x"]
    path = tmp_path / "t.csv"
    path.write_text('a,b\n5" disk,1\n"x,2\n')
    assert [row["a"] for _, row in table_rows(path, ["a"], "", quoted=False)] == ['5" disk', '"x']


def test_columns_may_be_named_where_the_file_does_not(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("1\tgood\n0\tbad\n")
    assert list(table_rows(path, ["a", "b"], "", names=["a", "b"])) == [
        (1, {"a": "1", "b": "good"}),
        (2, {"a": "0", "b": "bad"}),
    ]
    assert "lines 1 and 2: 2 cells, where data.corpus.columns names 3" in said(path, ["a"], names=["a", "b", "c"])
    assert "no column 'body'; it has '1', 'good'." in said(path)


def test_rows_of_another_width_are_told_together(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("id\tbody\n1\tone\n2\n3\tthree\tmore\n4\n")
    message = said(path)
    assert message.startswith(f"{path}, lines 3 and 5: 1 cell, where the first line has 2; line 4: 3 cells, where")
    assert message.count("data.corpus.quoted=true") == 1
    path.write_text("body\n" + "a\tb\n" * 25)
    assert "lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 15 more: 2 cells" in said(path)


def test_broken_quotes_are_told_together_at_the_line_they_start(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('id,body\n1,"a" b\n2,fine\n3,"c" d\n4,"never\nclosed\n')
    message = said(path)
    assert "lines 2 and 4: ',' expected after '\"'; line 5: unexpected end of data." in message
    assert "data.corpus.quoted=false" in message
    path.write_text('"id" x,body\n1,a\n')
    assert "line 1: ',' expected after '\"'" in said(path)


def test_json_that_is_none_is_told_together(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "a"}\n{\n[1]\n{"body": "b"}\n"text"\n[2]\n')
    message = said(path)
    assert "t.jsonl, line 2: not JSON (" in message
    assert "; lines 3 and 6: list in place of an object; line 5: str in place of an object. Expected" in message
    path.write_text("".join(f"{' ' * i}{{\n" for i in range(14)))
    assert message.count("Expected an object on each line.") == 1
    assert "; and 4 more. Expected an object on each line." in said(path)


def test_characters_of_jsonl_are_whole(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "\\ud83d\\ude00 \\ud55c"}\n{"body": "\\ud83d"}\n')
    rows = table_rows(path, ["body"], "")
    assert next(rows) == (1, {"body": "\U0001f600 \ud55c"})
    assert "t.jsonl, line 2: half of a surrogate pair. " in said(path)


def test_columns_of_jsonl_may_be_missing_in_some_rows_not_in_all(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"boby": "a"}\n{"body": "b"}\n')
    assert [row.get("body") for _, row in table_rows(path, ["body"], "")] == [None, "b"]
    path.write_text('{"boby": "a"}\n{"id": "b"}\n')
    assert "has no column 'body'; it has 'boby', 'id'. Did you mean 'boby'?" in said(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_files_with_nothing_in_them(tmp_path, kind):
    (tmp_path / f"t.{kind}").write_text("\n\n")
    assert "has no column 'body'; it has none." in said(tmp_path / f"t.{kind}")


def test_columns_that_stand_twice(tmp_path):
    (tmp_path / "t.tsv").write_text("body\tid\tbody\na\tb\tc\n")
    assert "2 columns 'body'" in said(tmp_path / "t.tsv")
    assert len(list(table_rows(tmp_path / "t.tsv", ["id"], ""))) == 1


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"body\nfine\n\xe9\nfine\n\xff\n")
    message = said(path)
    assert "t.tsv is not UTF-8: lines 3 and 5" in message
    assert "iconv" in message


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_that_are_cut_off(tmp_path, kind):
    rows = [{"id": str(i), "body": f"text {i * 7919 % 10007}"} for i in range(2000)]
    path = write(tmp_path, kind, rows)
    packed = gzip.compress(path.read_bytes())
    (tmp_path / f"cut.{kind}.gz").write_bytes(packed[: len(packed) // 2])
    assert "cut off" in said(tmp_path / f"cut.{kind}.gz")
    (tmp_path / f"plain.{kind}.gz").write_bytes(path.read_bytes())
    assert "gzip" in said(tmp_path / f"plain.{kind}.gz")
    if kind == "parquet":
        path.write_bytes(path.read_bytes()[:-100])
        assert "expected a whole Parquet file" in said(path)


def test_files_and_globs(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.tsv").write_text(name)
    assert [path.name for path in found(str(tmp_path / "*.tsv"), "train")] == ["a.tsv", "b.tsv", "c.tsv"]
    both = [str(tmp_path / "c.tsv"), str(tmp_path / "[ab].tsv")]
    assert [path.name for path in found(both, "train")] == ["c.tsv", "a.tsv", "b.tsv"]
    with pytest.raises(UserError, match=r"corpus.test=.*none.tsv: there is no such file"):
        found(str(tmp_path / "none.tsv"), "test")
    assert [kind_of(Path(name)) for name in ("a.JSONL", "a.ndjson.gz", "a.txt", "a")] == ["jsonl", "jsonl", None, None]


def test_problems_are_grouped_and_counted():
    broken = BrokenRows("file", "row")
    broken.check()
    for number in range(30):
        broken.add(number, "odd" if number % 2 else "even", "Mend it." if number % 2 else "Leave it.")
    broken.add(30, "worse", "Never told.")
    with pytest.raises(UserError) as raised:
        broken.check()
    assert str(raised.value) == (
        "file, rows 0, 2, 4, 6, 8 and 10 more: even; rows 1, 3, 5, 7, 9 and 10 more: odd; and 1 more. "
        "Leave it. Mend it. Rows are counted from 0."
    )
    assert listed("line", [2], 1) == "line 2"
    with pytest.raises(UserError, match=r"it has 'a{40}\.\.\.'\. Fix"):
        check_columns("f", ["b"], ["a" * 50], "Fix")


@pytest.mark.parametrize("within", [False, True])
def test_parallel_files_read_parquet(tmp_path, within):
    rows = [{"en": "one", "de": "eins"}, {"en": None, "de": "zwei"}, {"en": "three", "de": "drei"}]
    Dataset.from_list([{"translation": row, "n": 1} for row in rows] if within else rows).to_parquet(
        tmp_path / "t.parquet"
    )
    corpus = ParallelFiles(
        train=str(tmp_path / "t.parquet"), languages=("en", "de"), skip_incomplete=True, cache_dir=str(tmp_path / "c")
    )
    sides = [side.rows("train")["text"][:] for side in corpus.parts()[0].corpora]
    assert sides == [["one", "three"], ["eins", "drei"]]
    with pytest.raises(UserError, match=r"no column 'fr'; it has 'en', 'de'.*data.corpus.languages"):
        ParallelFiles(train=str(tmp_path / "t.parquet"), languages=("en", "fr")).parts()[0].corpora[0].rows("train")


def test_parallel_files_tell_all_texts_that_are_none(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"en": "a", "de": 1}\n{"en": "b", "de": "c"}\n{"en": ["d"], "de": 2}\n')
    corpus = ParallelFiles(train=str(tmp_path / "t.jsonl"), languages=("en", "de"))
    with pytest.raises(UserError, match=r"lines 1 and 3: column 'de' holds int; line 3: column 'en' holds list"):
        corpus.parts()[0].corpora[0].rows("train")
