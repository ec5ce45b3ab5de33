"""Labelled texts of local files and of folders in the hub's formats: their classes and groups, and every mistake."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lmexp.contracts import UserError
from lmexp.corpus.labelled import LabelledFiles, LabelledHub

ROWS = [("a fine day", "good"), ("a bad day", "bad"), ("an odd, odd day", "neutral"), ("the best ☃", "good")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write(path: Path, columns: dict[str, list]) -> str:
    """A table of the kind that its name says."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if plain.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(plain)
    elif plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        between = "," if plain.suffix == ".csv" else "\t"
        cells = [[f'"{x}"' if between in str(x) else str(x) for x in row.values()] for row in rows]
        lines = [between.join(line) for line in [list(columns), *cells]]
        plain.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return str(path)


def columns(rows, text="text", label="label") -> dict[str, list]:
    return {text: [row[0] for row in rows], label: [row[1] for row in rows]}


def pairs(corpus, split="train") -> list[tuple]:
    """(text, label) of each row, the label by its name."""
    rows = corpus.rows(split)
    assert str(rows.features["text"].dtype) == "large_string"
    assert rows.features["label"].dtype == rows.features["group"].dtype == "int64"
    return [(row["text"], corpus.labels[row["label"]]) for row in rows]


KINDS = ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz", "parquet.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(tmp_path, kind):
    path = write(tmp_path / f"t.{kind}", columns(ROWS, "sentence", "class"))
    corpus = LabelledFiles(path, test=path, text="sentence", label="class", cache_dir=str(tmp_path / "c"))
    assert (corpus.splits, corpus.n_texts, corpus.groups) == (("train", "test"), 1, ())
    assert (corpus.streaming, corpus.multilabel) == (False, False)
    assert corpus.labels == ("bad", "good", "neutral")
    assert pairs(corpus) == pairs(corpus, "test") == ROWS
    assert corpus.rows("train").column_names == ["text", "label", "group"]
    assert corpus.rows("train")["group"][:] == [0, 0, 0, 0]
    wrong = LabelledFiles(path, text="sentnce", label="class")
    with pytest.raises(UserError, match=r"no column 'sentnce'.*Did you mean 'sentence'\?.*data.corpus.text=NAME"):
        wrong.rows("train")


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_numbers_and_truth_values(tmp_path, kind):
    path = write(tmp_path / f"t.{kind}", columns([("a", 0), ("b", 10), ("c", 9), ("d", 0)]))
    assert LabelledFiles(path).labels == ("0", "9", "10"), "by their value"
    assert LabelledFiles(path).rows("train")["label"][:] == [0, 2, 1, 0]
    path = write(tmp_path / f"u.{kind}", columns([("a", 0), ("b", 1), ("c", 0)]))
    assert pairs(LabelledFiles(path, labels=["negative", "positive"])) == [
        ("a", "negative"),
        ("b", "positive"),
        ("c", "negative"),
    ]
    assert LabelledFiles(path, labels=[1, 0]).rows("train")["label"][:] == [1, 0, 1], "names that are numbers are names"
    if kind != "tsv":
        path = write(tmp_path / f"v.{kind}", columns([("a", True), ("b", False)]))
        assert LabelledFiles(path).labels == ("false", "true")
        assert pairs(LabelledFiles(path, labels=["no", "yes"])) == [("a", "yes"), ("b", "no")]


def test_given_labels_give_the_order(tmp_path):
    path = write(tmp_path / "t.tsv", columns(ROWS))
    corpus = LabelledFiles(path, labels=["neutral", "good", "bad", "awful"])
    assert corpus.labels == ("neutral", "good", "bad", "awful")
    assert corpus.rows("train")["label"][:] == [1, 2, 0, 1]


def test_several_files_are_one_split(tmp_path):
    for number, row in enumerate(ROWS):
        write(tmp_path / f"{number}.{'tsv' if number % 2 else 'jsonl'}", columns([row]))
    assert pairs(LabelledFiles(str(tmp_path / "*.[tj]s*"))) == ROWS
    corpus = LabelledFiles([str(tmp_path / "2.jsonl"), str(tmp_path / "[01].*")])
    assert pairs(corpus) == [ROWS[2], ROWS[0], ROWS[1]]


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_pairs_of_texts_and_groups(tmp_path, kind):
    table = {
        "premise": ["it rains", "es regnet", "il pleut"],
        "hypothesis": ["it is wet", "es ist trocken", "il neige"],
        "label": ["yes", "no", "maybe"],
        "language": ["en", "de", "fr"],
    }
    path = write(tmp_path / f"t.{kind}", table)
    other = write(tmp_path / f"o.{kind}", {name: values[:1] for name, values in table.items()} | {"language": ["sw"]})
    corpus = LabelledFiles(path, validation=other, text=["premise", "hypothesis"], group="language")
    assert corpus.n_texts == 2
    assert corpus.groups == ("de", "en", "fr", "sw"), "those of all splits"
    rows = corpus.rows("train")
    assert rows.column_names == ["text", "text2", "label", "group"]
    assert [str(rows.features[name].dtype) for name in ("text", "text2")] == ["large_string"] * 2
    assert (rows["text"][:], rows["text2"][:]) == (table["premise"], table["hypothesis"])
    assert [corpus.groups[number] for number in rows["group"]] == table["language"]
    assert corpus.rows("validation")["group"][:] == [3]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_any_number_of_labels(tmp_path, kind):
    labels = [["joy", "fear"], ["fear"], [], ["anger", "joy", "joy"]]
    flat = kind in ("csv", "tsv")
    path = write(tmp_path / f"t.{kind}", {"text": list("abcd"), "label": [";".join(x) if flat else x for x in labels]})
    corpus = LabelledFiles(path, multilabel=True, separator=";")
    assert corpus.labels == ("anger", "fear", "joy")
    assert corpus.rows("train")["label"][:] == [[1, 2], [1], [], [0, 2]]
    assert str(corpus.rows("train").with_format("arrow")[:]["label"].type) == "list<item: int64>"
    with pytest.raises(UserError, match=r"'joy' is none of the classes"):
        LabelledFiles(path, multilabel=True, separator=";", labels=["anger", "fear"]).rows("train")
    if not flat:
        with pytest.raises(UserError, match=r"list in column 'label'.*multilabel=true"):
            LabelledFiles(path).rows("train")


def test_tables_without_a_line_of_names(tmp_path):
    (tmp_path / "t.tsv").write_text('1\ta "good" one\n0\ta bad one\n')
    corpus = LabelledFiles(str(tmp_path / "t.tsv"), columns=["label", "text"], labels=["negative", "positive"])
    assert pairs(corpus) == [('a "good" one', "positive"), ("a bad one", "negative")]
    with pytest.raises(UserError, match=r"no column 'text'.*data.corpus.columns=\[NAME,NAME\]"):
        LabelledFiles(str(tmp_path / "t.tsv")).rows("train")
    with pytest.raises(UserError, match=r"corpus.columns has no column 'text'"):
        LabelledFiles(str(tmp_path / "t.tsv"), columns=["label", "txt"])
    path = write(tmp_path / "t.jsonl", columns(ROWS))
    with pytest.raises(UserError, match=r"corpus.columns=.* does not fit .*t.jsonl"):
        LabelledFiles(path, columns=["label", "text"]).rows("train")


def test_cuts_of_train_are_a_partition_by_content(tmp_path):
    rows = [(f"text {i % 400}", f"class {i % 3}") for i in range(1200)]
    path = write(tmp_path / "t.tsv", columns(rows))
    corpus = LabelledFiles(path, validation_fraction=0.2, test_fraction=0.1)
    assert corpus.splits == ("train", "validation", "test")
    parts = {split: pairs(corpus, split) for split in corpus.splits}
    assert Counter(row for part in parts.values() for row in part) == Counter(rows)
    texts = [{text for text, _ in part} for part in parts.values()]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert 180 < len(parts["validation"]) < 300
    again = write(tmp_path / "r.tsv", columns(rows[::-1]))
    assert sorted(pairs(LabelledFiles(again, validation_fraction=0.2), "validation")) == sorted(parts["validation"])
    given = LabelledFiles(path, validation=path, test_fraction=0.1)
    assert pairs(given, "validation") == rows, "a split that is given is not cut"
    with pytest.raises(UserError, match="exclude each other"):
        LabelledFiles(path, validation=path, validation_fraction=0.1)
    with pytest.raises(UserError, match="expected fractions"):
        LabelledFiles(path, validation_fraction=0.5, test_fraction=0.5)
    few = write(tmp_path / "f.tsv", columns(ROWS[:2]))
    with pytest.raises(UserError, match=r"None of the 2 training rows falls into the test split.*test_fraction"):
        LabelledFiles(few, test_fraction=0.01).rows("test")


def test_fingerprints_are_of_the_content_and_the_settings(tmp_path):
    path, same = (write(tmp_path / f"{name}.tsv", columns(ROWS)) for name in "ab")
    other = write(tmp_path / "c.tsv", columns(ROWS[:3]))
    first = LabelledFiles(path, cache_dir=str(tmp_path / "c")).fingerprint()
    assert LabelledFiles(same).fingerprint() == first
    assert LabelledFiles(path).fingerprint() == first
    settings = ({"labels": ["good", "bad", "neutral"]}, {"validation_fraction": 0.1}, {"quoted": True}, {"test": path})
    different = [LabelledFiles(other), *(LabelledFiles(path, **one) for one in settings)]
    assert len({first, *(corpus.fingerprint() for corpus in different)}) == 6


def test_a_changed_file_gives_other_rows(tmp_path):
    for rows in (ROWS, ROWS[1:]):
        path = write(tmp_path / "t.tsv", columns(rows))
        assert pairs(LabelledFiles(path, cache_dir=str(tmp_path / "c"))) == rows


def fails(path: str, split="train", **options) -> str:
    with pytest.raises(UserError) as raised:
        LabelledFiles(path, **options).rows(split)
    return str(raised.value)


def test_all_rows_that_are_wrong_are_told_at_once(tmp_path):
    rows = [("a", "x"), ("", "y"), (" ", "x"), ("d", ""), ("e", "y"), ("", "")]
    path = write(tmp_path / "t.tsv", columns(rows))
    message = fails(path)
    assert message.startswith(
        f"{path}, lines 3, 4 and 7: no text in column 'text'; lines 5 and 7: no label in column 'label'. Fill it in"
    )
    path = write(tmp_path / "t.parquet", columns([("a", "x"), (None, "y"), ("c", None)]))
    assert "row 1: no text in column 'text'; row 2: no label" in fails(path)
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": 3, "label": 1.5}\n{"label": "y"}\n')
    message = fails(str(tmp_path / "t.jsonl"))
    assert "line 2: int in column 'text'; line 2: float in column 'label'; line 3: no text in column 'text'" in message
    assert "data.corpus.text=NAME" in message
    path = write(tmp_path / "g.tsv", {**columns(ROWS[:2]), "kind": ["k", ""]})
    assert "line 3: no group in column 'kind'" in fails(path, group="kind")


def test_rows_that_lack_something_may_be_left_out(tmp_path):
    rows = [("a", "x"), ("", "y"), ("c", ""), ("d", "y")]
    path = write(tmp_path / "t.tsv", columns(rows))
    assert "data.corpus.skip_incomplete=true" in fails(path)
    assert pairs(LabelledFiles(path, skip_incomplete=True)) == [rows[0], rows[3]]
    path = write(tmp_path / "e.tsv", columns(rows[1:3]))
    assert "e.tsv has 2 rows, all of which lack something" in fails(path, skip_incomplete=True)
    path = write(tmp_path / "w.jsonl", columns([*rows, (5, "x")]))
    assert "line 5: int in column 'text'. Choose" in fails(path, skip_incomplete=True), "that is more than lacking"


def test_labels_outside_the_classes(tmp_path):
    path = write(tmp_path / "t.tsv", columns(ROWS))
    message = fails(path, labels=["good", "ugly"])
    assert (
        "t.tsv, line 3: label 'bad' is none of the classes; line 4: label 'neutral' is none of the classes" in message
    )
    assert "Expected one of 'good', 'ugly': data.corpus.labels" in message
    path = write(tmp_path / "n.tsv", columns([("a", 0), ("b", 1), ("c", 2), ("d", -1), ("e", 2)]))
    message = fails(path, labels=["negative", "positive"])
    assert "lines 4 and 6: label '2' is none of the classes; line 5: label '-1' is none" in message
    train = write(tmp_path / "a.tsv", columns(ROWS[:2]))
    dev = [write(tmp_path / f"{name}.tsv", columns(rows)) for name, rows in (("b", ROWS[:2]), ("c", ROWS[1:]))]
    message = fails(train, "validation", validation=dev)
    assert f"{dev[1]}, line 3: label 'neutral' is none of the classes" in message
    assert "The training split has 'bad', 'good'." in message
    assert "data.corpus.labels=[...]" in message
    path = write(tmp_path / "i.tsv", columns([("a", 0), ("b", 1)]))
    assert "label '0' is none of the classes" in fails(train, "test", test=path), (
        "numbers stand for names that are given"
    )


def test_classes_that_tell_nothing(tmp_path):
    path = write(tmp_path / "t.tsv", columns([("a", "x"), ("b", "x")]))
    for options in ({}, {"labels": ["x", "y"]}):
        message = fails(path, **options)
        assert "t.tsv: the training rows have only the label 'x'; expected at least two" in message
        assert "data.corpus.label=NAME" in message
    other = write(tmp_path / "o.tsv", columns(ROWS))
    assert len(LabelledFiles(other, validation=path, labels=["x", "good", "bad", "neutral"]).rows("validation")) == 2
    path = write(tmp_path / "m.jsonl", columns([("a", []), ("b", [])]))
    assert "have no labels; expected at least one" in fails(path, multilabel=True)
    path = write(tmp_path / "u.tsv", columns([(f"{i}", f"the text {i}") for i in range(200)]))
    assert "the 200 training rows have 200 different labels, such as 'the text 0'" in fails(path)


def test_tables_that_are_broken(tmp_path):
    (tmp_path / "t.tsv").write_text("text\tlabel\na\tx\nb\nc\ty\tz\n")
    message = fails(str(tmp_path / "t.tsv"))
    assert "line 3: 1 cell, where the first line has 2; line 4: 3 cells" in message
    (tmp_path / "t.csv").write_text("text,label\n")
    assert "t.csv has no rows" in fails(str(tmp_path / "t.csv"))
    (tmp_path / "t.txt").write_text("a\tx\n")
    assert "t.txt is no table; expected one that ends in .jsonl" in fails(str(tmp_path / "t.txt"))
    assert "there is no such file" in fails(str(tmp_path / "none.tsv"))
    path = write(tmp_path / "l.jsonl", columns([("a", "x"), ("b", ["y"])]))
    assert "line 1: str in column 'label'" in fails(path, multilabel=True)


def test_settings_are_checked(tmp_path):
    path = write(tmp_path / "t.tsv", columns(ROWS))
    for options, said in (
        ({"train": None}, r"corpus.train is not given"),
        ({"text": ["a", "b", "c"]}, r"corpus.text=.*a list of two"),
        ({"text": ["a", "a"]}, r"corpus.text="),
        ({"labels": "good"}, r"corpus.labels=good; expected a list"),
        ({"labels": ["good"]}, r"at least 2 different names"),
        ({"labels": ["good", "good"]}, r"corpus.labels="),
        ({"separator": ""}, r"corpus.separator"),
    ):
        with pytest.raises(UserError, match=said):
            LabelledFiles(**{"train": path, **options})
    with pytest.raises(UserError, match=r"no test split, only train; set data.corpus.test=NAME, or .*test_fraction"):
        LabelledFiles(path).rows("test")


NAMES = ["negative", "positive"]
TRAIN = {"sentence": [f"train {i}" for i in range(6)], "label": [0, 1, 1, 0, 1, 0]}
DEV = {"sentence": ["dev 0", "dev 1"], "label": [1, 0]}
HIDDEN = {"sentence": ["test 0", "test 1"], "label": [-1, -1]}


@pytest.fixture(params=["parquet", "readme", "disk"])
def folder(request, tmp_path):
    """A data set with a column of classes, in every form that says so."""
    path = tmp_path / "data"
    path.mkdir()
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=NAMES)})
    if request.param == "readme":
        info = "dataset_info:\n  features:\n  - name: sentence\n    dtype: string\n  - name: label\n    dtype:\n"
        info += "      class_label:\n        names:\n          '0': negative\n          '1': positive\n"
        (path / "README.md").write_text(f"---\n{info}---\n")
        for split, table in (("train", TRAIN), ("validation", DEV), ("test", HIDDEN)):
            Dataset.from_dict(table).to_csv(path / f"{split}.csv")
        return path
    sets = {
        split: Dataset.from_dict(table, features=features)
        for split, table in (("train", TRAIN), ("validation", DEV), ("test", HIDDEN))
    }
    if request.param == "disk":
        DatasetDict(sets).save_to_disk(path)
    else:
        for split, dataset in sets.items():
            dataset.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


def test_hub_classes(folder):
    corpus = LabelledHub(str(folder), validation="validation", text="sentence")
    assert corpus.labels == ("negative", "positive")
    assert (corpus.splits, corpus.n_texts, corpus.groups) == (("train", "validation"), 1, ())
    assert pairs(corpus) == [(text, NAMES[label]) for text, label in zip(*TRAIN.values(), strict=True)]
    assert corpus.rows("validation")["label"][:] == DEV["label"]
    part = LabelledHub(str(folder), train="train[:4]", validation="train[4:]", text="sentence")
    assert [len(part.rows(split)) for split in part.splits] == [4, 2]
    cut = LabelledHub(str(folder), text="sentence", validation_fraction=0.4)
    assert sorted([*pairs(cut), *pairs(cut, "validation")]) == sorted(pairs(corpus))


def test_hub_classes_may_be_put_in_order_or_renamed(folder):
    turned = LabelledHub(str(folder), text="sentence", labels=["positive", "negative"])
    assert turned.rows("train")["label"][:] == [1 - label for label in TRAIN["label"]]
    renamed = LabelledHub(str(folder), text="sentence", labels=["thumbs down", "thumbs up"])
    assert renamed.rows("train")["label"][:] == TRAIN["label"]
    assert renamed.labels == ("thumbs down", "thumbs up")
    assert LabelledHub(str(folder), text="sentence", labels=[1, 2]).rows("train")["label"][:] == TRAIN["label"]
    with pytest.raises(UserError, match=r"does not fit the classes of .*, negative, positive; expected these"):
        LabelledHub(str(folder), text="sentence", labels=["negative", "good"]).rows("train")


def test_hidden_labels_are_told_as_such(folder):
    corpus = LabelledHub(str(folder), test="test", text="sentence")
    assert len(corpus.rows("train")) == 6
    with pytest.raises(
        UserError, match=r"'test', rows 0 and 1: label -1.*not published.*data.corpus.test=NAME, or null"
    ):
        corpus.rows("test")
    with pytest.raises(UserError, match=r"'test' has 2 rows, all of which lack something"):
        LabelledHub(str(folder), test="test", text="sentence", skip_incomplete=True).rows("test")


def test_hub_fingerprints(folder, tmp_path):
    corpus = LabelledHub(str(folder), text="sentence")
    assert corpus.fingerprint() == LabelledHub(str(folder), text="sentence").fingerprint()
    first = corpus.fingerprint()
    moved = str(folder.rename(tmp_path / "moved"))
    assert LabelledHub(moved, text="sentence", cache_dir=str(tmp_path / "c")).fingerprint() == first
    assert LabelledHub(moved, text="sentence", train="train[:4]").fingerprint() != first


def test_hub_columns_without_classes(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    write(path / "train.csv", columns(ROWS))
    assert pairs(LabelledHub(str(path))) == ROWS
    assert LabelledHub(str(path)).labels == ("bad", "good", "neutral")
    with pytest.raises(UserError, match=r"no column 'lable'; it has 'text', 'label'. Did you mean 'label'\?"):
        LabelledHub(str(path), label="lable").rows("train")
    write(path / "train.csv", columns([("a", -1), ("b", 1), ("c", -1)]))
    with pytest.raises(UserError, match=r"rows 0 and 2: label -1.*data.corpus.labels=\[-1,1\]"):
        LabelledHub(str(path)).rows("train")
    write(path / "train.csv", columns([("a", -1), ("b", 1), ("c", 0)]))
    assert pairs(LabelledHub(str(path), skip_incomplete=True)) == [("b", "1"), ("c", "0")]
    write(path / "train.csv", columns([("a", -1), ("b", 1), ("c", -1)]))
    assert LabelledHub(str(path), labels=[-1, 1]).rows("train")["label"][:] == [0, 1, 0]


def test_hub_lists_of_classes_and_groups(tmp_path):
    table = {"text": ["a", "b", "c"], "label": [[0, 1], [], [1]], "kind": [1, 0, 1]}
    features = {"text": Value("string"), "label": [ClassLabel(names=NAMES)], "kind": ClassLabel(names=["old", "new"])}
    Dataset.from_dict(table, features=Features(features)).to_parquet(tmp_path / "data" / "train.parquet")
    corpus = LabelledHub(str(tmp_path / "data"), multilabel=True, group="kind")
    assert corpus.labels == ("negative", "positive")
    assert corpus.rows("train")["label"][:] == table["label"]
    assert corpus.groups == ("new", "old")
    assert corpus.rows("train")["group"][:] == [0, 1, 0]


@pytest.fixture
def languages(tmp_path):
    """A data set with a configuration for each language, as XNLI has it."""
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=NAMES)})
    configs = "configs:\n"
    for language in ("de", "en", "fr"):
        configs += f"- config_name: {language}\n  data_files:\n"
        for split, label in (("train", [0, 1]), ("validation", [1])):
            n = len(label)
            table = {
                name: [f"{language} {name[0]} {split} {i}" for i in range(n)] for name in ("premise", "hypothesis")
            }
            path = tmp_path / "xnli" / language / f"{split}.parquet"
            Dataset.from_dict({**table, "label": label}, features=features).to_parquet(path)
            configs += f"  - split: {split}\n    path: {language}/{split}.parquet\n"
    (tmp_path / "xnli" / "README.md").write_text(f"---\n{configs}---\n")
    return str(tmp_path / "xnli")


def test_several_configs_are_groups(languages):
    options = {"validation": "validation", "text": ["premise", "hypothesis"]}
    corpus = LabelledHub(languages, ["en", "de", "fr"], **options)
    assert corpus.groups == ("en", "de", "fr")
    assert corpus.labels == ("negative", "positive")
    train, validation = corpus.rows("train"), corpus.rows("validation")
    assert train["text"][:] == ["en p train 0", "en p train 1"], "of the first"
    assert train["group"][:] == [0, 0]
    assert validation["text2"][:] == [f"{language} h validation 0" for language in ("en", "de", "fr")]
    assert validation["group"][:] == [0, 1, 2]
    both = LabelledHub(languages, ["en", "de", "fr"], train_configs=["fr", "de"], **options)
    assert both.rows("train")["group"][:] == [2, 2, 1, 1]
    assert both.fingerprint() != corpus.fingerprint()
    one = LabelledHub(languages, "de", **options)
    assert one.groups == ()
    assert one.rows("train")["group"][:] == [0, 0]


def test_hub_settings_are_checked(languages, monkeypatch):
    for options, said in (
        ({"name": None}, "corpus.name is not given"),
        ({"train": None}, "corpus.train is not given"),
        ({"config": []}, r"corpus.config=\[\]"),
        ({"config": ["en", "en"]}, "different ones"),
        ({"config": ["en", "de"], "group": "kind"}, "corpus.group=kind"),
        ({"config": ["en", "de"], "train_configs": ["fr"]}, r"corpus.train_configs=\['fr'\]; expected some of"),
        ({"config": ["en", "de"], "train_configs": "en"}, "corpus.train_configs=en"),
    ):
        with pytest.raises(UserError, match=said):
            LabelledHub(**{"name": languages, **options})
    with pytest.raises(UserError, match=r"Cannot load 'train'.*config xx"):
        LabelledHub(languages, "xx").rows("train")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)nobody/nothing.*local folder"):
        LabelledHub("nobody/nothing").rows("train")
