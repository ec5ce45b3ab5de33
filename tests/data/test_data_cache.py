"""The token cache: right, built once, never half, cheap to open."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from lmexp.contracts import UserError
from lmexp.data import cache as cache_module
from lmexp.data.cache import open_cache, trained_tokenizer
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte
from lmexp.tokenizer.char import Char

TEXTS = {"train": ["abc", "", "dé\n", "x" * 1000], "validation": ["abz"]}


class Lists:
    """A corpus of lists that counts how often it is read."""

    streaming = False

    def __init__(self, texts):
        self.texts = texts
        self.reads = 0

    @property
    def splits(self):
        return tuple(self.texts)

    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def rows(self, split):
        self.reads += 1
        return Dataset.from_dict({"text": self.texts[split]})


def files_in(folder):
    return {path.name for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_streams_offsets_and_report(tmp_path):
    tokenizer = Char().train(iter(TEXTS["train"]))
    cache = open_cache(Lists(TEXTS), tokenizer, ["train", "validation"], tmp_path)
    expected = [0]
    for text in TEXTS["train"]:
        if text:
            expected += [*tokenizer.encode([text])[0].tolist(), 0]
    stream = cache.stream("train").tokens
    assert stream.tolist() == expected
    assert stream.dtype == np.uint16
    offsets = cache.offsets("train")
    documents = [stream[a : b - 1] for a, b in itertools.pairwise(offsets)]
    assert [tokenizer.decode(d) for d in documents] == [text for text in TEXTS["train"] if text]
    train, validation = cache.report.splits["train"], cache.report.splits["validation"]
    assert (train.documents, train.tokens, train.longest, train.unknown) == (3, len(expected), 1000, 0)
    assert train.bytes == sum(len(text.encode()) for text in TEXTS["train"])
    assert (validation.documents, validation.unknown) == (1, 1)
    assert cache.report.sample == "abc"
    assert "| train | 3 | 1,010 | 1,007 | 1.00 | 336.67 | 0.000% | 0.000% | 1,000 |" in cache.report.markdown()
    with pytest.raises(UserError, match=r"no test split; it has train, validation"):
        cache.stream("test")


def test_wide_vocabularies_take_four_bytes(tmp_path):
    tokenizer = Char().train(iter([chr(i) for i in range(0x10000, 0x10000 + 70_000)]))
    text = chr(0x10000 + 69_999)
    cache = open_cache(Lists({"train": [text]}), tokenizer, ["train"], tmp_path)
    assert cache.stream("train").tokens.dtype == np.uint32
    assert tokenizer.decode(cache.stream("train").tokens[1:2]) == text


def test_many_batches_are_one_stream(tmp_path, monkeypatch):
    corpus = Lists({"train": [f"document {i}" for i in range(1000)]})
    whole = open_cache(corpus, Byte().train(iter(())), ["train"], tmp_path / "a")
    monkeypatch.setattr(cache_module, "_BATCH", 100)
    parts = open_cache(corpus, Byte().train(iter(())), ["train"], tmp_path / "b")
    assert (whole.stream("train").tokens == parts.stream("train").tokens).all()
    assert (whole.offsets("train") == parts.offsets("train")).all()


def test_built_once_and_again_for_another_source_or_tokenizer(tmp_path):
    corpus = Lists(TEXTS)
    byte = Byte().train(iter(()))
    first = open_cache(corpus, byte, ["train"], tmp_path)
    assert open_cache(corpus, byte, ["train"], tmp_path).path == first.path
    assert corpus.reads == 1
    assert open_cache(corpus, Char().train(iter(["a"])), ["train"], tmp_path).path != first.path
    assert open_cache(Lists({"train": ["other"]}), byte, ["train"], tmp_path).path != first.path


def test_trained_tokenizers_are_kept(tmp_path):
    corpus = Lists(TEXTS)
    one = trained_tokenizer(BPE(260), corpus, tmp_path)
    two = trained_tokenizer(BPE(260), corpus, tmp_path)
    assert one.fingerprint() == two.fingerprint()
    assert corpus.reads == 1
    trained_tokenizer(BPE(261), corpus, tmp_path)
    assert corpus.reads == 2
    trained_tokenizer(Byte(), corpus, tmp_path)
    assert corpus.reads == 2


@pytest.mark.parametrize("harm", ["shorter", "missing", "manifest"])
def test_a_damaged_cache_is_built_again_and_says_so(tmp_path, harm):
    corpus = Lists(TEXTS)
    byte = Byte().train(iter(()))
    path = open_cache(corpus, byte, ["train"], tmp_path).path
    if harm == "shorter":
        os.truncate(path / "train.bin", 10)
    elif harm == "missing":
        (path / "train.offsets.npy").unlink()
    else:
        (path / "manifest.json").write_text('{"files": ')
    console = Console(record=True, file=io.StringIO(), width=500)
    cache = open_cache(corpus, byte, ["train"], tmp_path, console)
    assert cache.stream("train").tokens[1] == ord("a") + 1
    assert ("is damaged" in console.export_text()) == (harm != "manifest")


def test_an_empty_split_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"validation split of the corpus holds no text"):
        open_cache(
            Lists({"train": ["a"], "validation": [""]}), Byte().train(iter(())), ["train", "validation"], tmp_path
        )
    assert files_in(tmp_path) == set()


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*data.cache_dir=FOLDER"):
        open_cache(Lists(TEXTS), Byte().train(iter(())), ["train"], tmp_path)
    assert files_in(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir=FOLDER"):
        open_cache(Lists(TEXTS), Byte().train(iter(())), ["train"], tmp_path / "file")


BUILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_data_cache import Lists, TEXTS
from lmexp.data.cache import open_cache
from lmexp.tokenizer.byte import Byte, ByteTokenizer
import lmexp.data.cache as c
class Slow(Lists):
    def rows(self, split):
        print("reading", flush=True)
        yield_rows = super().rows(split)
        time.sleep({delay})
        return yield_rows
original = c._write_atomically
def slow_write(path, content):
    time.sleep({delay})
    original(path, content)
c._write_atomically = slow_write
cache = open_cache(Slow(TEXTS), Byte().train(iter(())), ["train"], {cache!r})
print("tokens", cache.stream("train").n_tokens, flush=True)
"""


def start_build(cache, delay):
    code = BUILD.format(tests=str(Path(__file__).parent), cache=str(cache), delay=delay)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_four_processes_build_once(tmp_path):
    builds = [start_build(tmp_path, 1.0) for _ in range(4)]
    outputs = [build.communicate(timeout=120)[0] for build in builds]
    assert [build.returncode for build in builds] == [0] * 4
    assert sum(output.count("reading") for output in outputs) == 1
    assert len({output.split("tokens")[1] for output in outputs}) == 1


def test_a_killed_build_leaves_nothing_taken_for_whole(tmp_path):
    build = start_build(tmp_path, 30.0)
    assert build.stdout.readline() == "reading\n"
    time.sleep(0.2)
    os.kill(build.pid, signal.SIGKILL)
    build.wait()
    build.stdout.close()
    corpus = Lists(TEXTS)
    byte = Byte().train(iter(()))
    cache = open_cache(corpus, byte, ["train"], tmp_path)
    assert corpus.reads == 1
    assert cache.stream("train").tokens[1] == ord("a") + 1
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {cache.path.name, f"{cache.path.name}.lock"}


def test_opening_costs_the_same_at_any_size(tmp_path):
    """A sparse file of 40 GB in place of the tokens: it must be neither read nor hashed."""
    corpus = Lists(TEXTS)
    byte = Byte().train(iter(()))
    path = open_cache(corpus, byte, ["train"], tmp_path).path
    manifest = json.loads((path / "manifest.json").read_text())
    n = 20 * 10**9
    os.truncate(path / "train.bin", 2 * n)
    manifest["files"]["train.bin"] = 2 * n
    manifest["report"]["splits"]["train"]["tokens"] = n
    (path / "manifest.json").write_text(json.dumps(manifest))
    start = time.perf_counter()
    cache = open_cache(corpus, byte, ["train"], tmp_path)
    assert cache.stream("train").tokens[n - 1] == 0
    assert time.perf_counter() - start < 0.1
    assert corpus.reads == 1


def test_opening_does_not_import_datasets_or_torch(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("some text " * 100)
    code = (
        "import sys; from lmexp.corpus.files import Files; from lmexp.tokenizer.bpe import BPE; "
        "from lmexp.data.cache import open_cache, trained_tokenizer; "
        f"corpus = Files(path={str(text)!r}, cache_dir={str(tmp_path)!r}, validation_fraction=0.0); "
        f"tokenizer = trained_tokenizer(BPE(260), corpus, {str(tmp_path)!r}); "
        f"open_cache(corpus, tokenizer, ['train'], {str(tmp_path)!r}); "
        "print({'datasets', 'torch'} & set(sys.modules))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        for _ in range(2)
    ]
    assert "datasets" in runs[0].stdout
    assert runs[1].stdout.strip() == "set()"
