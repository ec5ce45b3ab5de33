"""Batches of a number of tokens: as many texts as fit by a brute force, the same whatever the devices, the workers and
where a run began."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.contracts import UserError
from lmexp.corpus.parallel_files import ParallelFiles
from lmexp.data.budget import TokenBudget
from lmexp.data.text import TextData
from lmexp.objective.classification import Classification
from lmexp.objective.text_to_text import TextToText
from lmexp.task.base import tokens_read
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte
from tests.data.test_data_resplit import Labelled

RANDOM = np.random.default_rng(0)
TEXTS = ["x" * n for n in RANDOM.integers(1, 60, 300)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 9000), st.integers(0, 500))
def test_as_many_as_fit(lengths, tokens, first) -> None:
    def length(i):
        return lengths[i % len(lengths)]

    size = TokenBudget(lambda indices: np.array([length(i) for i in indices]), tokens).size(first)
    assert size >= 1
    assert sum(length(i) for i in range(first, first + size)) <= tokens
    assert sum(length(i) for i in range(first, first + size + 1)) > tokens


@pytest.fixture(params=["pairs", "pairs_decoder", "labelled", "two_texts"])
def make(request, tmp_path):
    """Makes the data module of a kind of texts; what its samples read is counted from the batches."""
    if request.param.startswith("pairs"):
        for name, texts in (("en", TEXTS), ("de", [t.upper() for t in TEXTS[::-1]])):
            (tmp_path / f"train.{name}").write_text("\n".join(texts), encoding="utf-8")
        source = {name: str(tmp_path / f"train.{name}") for name in ("en", "de")}
        corpus = ParallelFiles(train=source, validation=source, cache_dir=str(tmp_path / "cache"))
        objective = TextToText()
    else:
        corpus, objective = Labelled(1 if request.param == "labelled" else 2, TEXTS), Classification()
    family = {"pairs": "encoder_decoder", "pairs_decoder": "decoder"}.get(request.param, "encoder")

    def made(rank=0, world_size=1, workers=0, tokens=400, most=None):
        data = TextData(corpus, str(tmp_path / "cache"), 64, False, None, 4, workers, 2, 50, batch_tokens=tokens)
        data.configure(Byte(), objective, None, 1, max_samples=most, family=family)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=None)
        data.prepare()
        return data

    return made


def indices(data, count):
    found = data._train_indices(*data._rank())
    return [list(batch) for batch in itertools.islice(found, count)]


def test_batches_are_full_and_leave_nothing_out(make) -> None:
    data = make()
    batches = indices(data, 60)
    assert list(itertools.chain(*batches)) == list(range(sum(map(len, batches))))
    assert len({len(batch) for batch in batches}) > 1
    source = data._train_source()

    def read(batch):
        return sum(int(tokens_read(data._recipe(1)(source.samples([i])))) for i in batch)

    for batch in batches:
        assert read(batch) <= 400
        assert read([*batch, batch[-1] + 1]) > 400


@pytest.mark.parametrize("kind", ["pairs", "classes"])
def test_texts_cut_anew_fit_too(tmp_path, kind) -> None:
    words = ["lower", "lowest", "newer", "newest", "wider", "widest"]
    lines = [" ".join(RANDOM.choice(words, 9)) for _ in range(80)]
    for name in ("en", "de"):
        (tmp_path / f"train.{name}").write_text("\n".join(lines), encoding="utf-8")
    source = {name: str(tmp_path / f"train.{name}") for name in ("en", "de")}
    corpus = ParallelFiles(train=source, validation=source, cache_dir=str(tmp_path / "cache"))
    objective = TextToText() if kind == "pairs" else Classification()
    corpus = corpus if kind == "pairs" else Labelled(1, TEXTS)
    options = {"bpe_dropout": 0.3, "batch_tokens": 300}
    data = TextData(corpus, str(tmp_path / "cache"), 64, False, None, 4, 0, 2, 50, **options)
    data.configure(BPE(300), objective, None, 1, family="encoder_decoder").prepare()
    batches = [int(tokens_read(batch)) for batch in itertools.islice(data.train_dataloader(), 30)]
    assert max(batches) <= 300
    assert min(batches) > 100
    data.batch_tokens = 120
    with pytest.raises(UserError, match=r"data.batch_tokens=120: the longest training sample has 128 tokens"):
        data.check_budget(1)


def test_the_same_for_any_devices_workers_and_beginning(make) -> None:
    whole = make()
    halves = [indices(make(rank=rank, world_size=2), 20) for rank in (0, 1)]
    batches = indices(whole, 20)
    assert [a + b for a, b in zip(*halves, strict=True)] == batches
    assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(*halves, strict=True))
    assert (whole.samples_seen, whole.span) == (0, (0, batches[0][-1]))
    again = make(workers=2)
    again.load_state_dict({"samples": batches[3][0]})
    assert again.span == (batches[3][0], batches[3][-1])
    read = [b["inputs"]["tokens"].tolist() for b in itertools.islice(whole.train_dataloader(), 5)]
    assert [b["inputs"]["tokens"].tolist() for b in itertools.islice(again.train_dataloader(), 2)] == read[3:]


def test_a_few_samples_over_and_over(make) -> None:
    data = make(most=3)
    lengths = [s.tokens.tolist() for s in data._train_source().samples(range(9))]
    assert lengths[:3] == lengths[3:6] == lengths[6:]
    assert data._budget.lengths(range(9)).tolist() == data._budget.lengths(range(3)).tolist() * 3


def test_too_few_tokens(make) -> None:
    with pytest.raises(UserError, match=r"data.batch_tokens=50: the longest training sample has (\d+) tokens; set"):
        make(tokens=50).check_budget(1)
    with pytest.raises(UserError, match=r"each of 2 devices gets one; set data.batch_tokens=\d+ or more"):
        make(tokens=100).check_budget(2)
