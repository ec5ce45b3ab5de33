"""Hub data sets, on local folders in the hub's formats."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from lmexp.contracts import UserError
from lmexp.corpus.hub import Hub

TRAIN = [f"train {i}" for i in range(10)]
TEST = [f"test {i}" for i in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(params=["parquet", "jsonl", "disk"])
def folder(request, tmp_path):
    path = tmp_path / "data"
    sets = {
        "train": Dataset.from_dict({"body": TRAIN, "n": list(range(10))}),
        "test": Dataset.from_dict({"body": TEST}),
    }
    if request.param == "disk":
        DatasetDict(sets).save_to_disk(path)
        return path
    path.mkdir()
    for split, dataset in sets.items():
        dataset = dataset.select_columns(["body"])
        getattr(dataset, "to_parquet" if request.param == "parquet" else "to_json")(path / f"{split}.{request.param}")
    return path


def test_map_style(folder):
    hub = Hub(str(folder), train="train[:60%]", validation="train[-4:]", test="test", column="body")
    assert hub.splits == ("train", "validation", "test")
    assert isinstance(hub.rows("train"), Dataset)
    assert [hub.rows(s)["text"][:] for s in hub.splits] == [TRAIN[:6], TRAIN[6:], TEST]


def test_streaming(folder):
    hub = Hub(str(folder), train="train[3:]", validation="train[:3]", column="body", streaming=True)
    rows = hub.rows("train")
    assert isinstance(rows, IterableDataset)
    assert [row["text"] for row in rows] == TRAIN[3:]
    assert [row["text"] for row in hub.rows("validation")] == TRAIN[:3]
    with pytest.raises(UserError, match="count rows from the front"):
        Hub(str(folder), train="train[:50%]", column="body", streaming=True).rows("train")


def test_rows_are_joined_to_documents(tmp_path):
    rows = [" = One = \n", "", " = = Part = = \n", " text\n", " = Two = \n", " more\n"]
    Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "wiki")
    hub = Hub(str(tmp_path / "wiki"), document_start="^ = [^=](.*[^=])? = \\n?$")
    assert hub.rows("train")["text"][:] == ["".join(rows[:4]), "".join(rows[4:])]


def test_fingerprint_follows_content_and_settings(folder):
    hub = Hub(str(folder), column="body")
    assert hub.fingerprint() == Hub(str(folder), column="body").fingerprint()
    assert hub.fingerprint() != Hub(str(folder), column="body", train="test").fingerprint()


def test_what_is_wrong_is_named(folder, monkeypatch):
    with pytest.raises(UserError, match=r"no column 'text'; it has 'body'"):
        Hub(str(folder)).rows("train")
    with pytest.raises(UserError, match=r"(?s)'dev'.*"):
        Hub(str(folder), validation="dev", column="body").rows("validation")
    with pytest.raises(UserError, match=r"corpus.test is null"):
        Hub(str(folder)).rows("test")
    with pytest.raises(UserError, match=r"corpus.name="):
        Hub(None)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)nobody/nothing.*local folder"):
        Hub("nobody/nothing").rows("train")
