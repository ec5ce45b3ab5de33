"""TextData: the same batches whatever makes them, on any number of ranks, after any restart."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from lmexp.contracts import IGNORE_INDEX, UserError
from lmexp.corpus.hub import Hub
from lmexp.data.text import TextData
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte

RANDOM = np.random.default_rng(0)
DOCUMENTS = ["".join(RANDOM.choice(list("abcdefgh \n"), RANDOM.integers(5, 300))) for _ in range(100)]


class Causal:
    """A stand-in for the objective: inputs and labels are the sample but for its last and first token."""

    families = ("decoder",)
    bits = "bits_per_byte"

    def special_tokens(self, family):
        return ()

    def sample_length(self, block_size):
        return block_size + 1

    def collate(self, tokenizer, family, start_id=None):
        return self.batch

    def batch(self, samples, block_size, seed):
        tokens = torch.zeros(len(samples), block_size, dtype=torch.int64)
        labels = torch.full((len(samples), block_size), IGNORE_INDEX)
        for row, sample in enumerate(samples):
            n = max(0, len(sample.tokens) - 1)
            tokens[row, :n] = torch.from_numpy(sample.tokens[:n])
            labels[row, :n] = torch.from_numpy(sample.tokens[1:])
        n_bytes = torch.tensor([float(sample.n_bytes[1:].sum()) for sample in samples])
        index = torch.tensor([sample.index for sample in samples])
        return {"inputs": {"tokens": tokens, "index": index}, "labels": labels, "n_bytes": n_bytes}


class Lists:
    streaming = False
    splits = ("train", "validation")

    def __init__(self, texts=DOCUMENTS):
        self.texts = texts

    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def rows(self, split):
        return Dataset.from_dict({"text": self.texts if split == "train" else self.texts[:9]})


def make(folder, corpus=None, rank=0, world_size=1, batch_size=8, seed=1, **options):
    settings = {
        "block_size": 32,
        "document_mask": False,
        "validation_blocks": None,
        "eval_batch_size": 4,
        "num_workers": 0,
        "prefetch": 2,
        "tokenizer_documents": 50,
        **options,
    }
    data = TextData(corpus or Lists(), str(folder), **settings)
    data.configure(Byte(), Causal(), batch_size, seed)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=None)
    data.prepare()
    return data


def take(data, count):
    return [
        (b["inputs"]["index"], b["inputs"]["tokens"], b["labels"])
        for b in itertools.islice(data.train_dataloader(), count)
    ]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed")
    for shard in range(3):
        Dataset.from_dict({"text": DOCUMENTS[shard::3]}).to_parquet(path / f"train-{shard}-of-3.parquet")
    return str(path)


@pytest.fixture(params=["cached", "streaming"])
def corpus(request, streamed):
    return Lists() if request.param == "cached" else Hub(streamed, streaming=True)


def test_batches_hold_the_global_indices(tmp_path, corpus):
    data = make(tmp_path, corpus)
    for step, (index, tokens, labels) in enumerate(take(data, 5)):
        assert index.tolist() == list(range(8 * step, 8 * step + 8))
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
    assert not hasattr(data.train_dataloader(), "__len__")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, corpus, workers):
    state = torch.get_rng_state()
    same(take(make(tmp_path, corpus), 12), take(make(tmp_path, corpus, num_workers=workers), 12))
    assert torch.equal(torch.get_rng_state(), state)  # nor the global random state


def test_two_ranks_share_the_batch_of_one(tmp_path, corpus):
    ranks = [take(make(tmp_path, corpus, rank=r, world_size=2), 60) for r in range(2)]
    united = [tuple(torch.cat(pair) for pair in zip(*step, strict=True)) for step in zip(*ranks, strict=True)]
    same(take(make(tmp_path, corpus), 60), united)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7, 40, 75])
def test_a_restart_goes_on_exactly(tmp_path, corpus, stop, workers):
    """75 steps are past the end of the data. One batch more is fetched than trained on, as Lightning does."""
    whole = take(make(tmp_path, corpus), 80)
    data = make(tmp_path, corpus, num_workers=workers)
    batches = iter(data.train_dataloader())
    next(batches)
    for _ in range(stop):
        next(batches)
        data.advance(8)
    saved = io.BytesIO()
    torch.save(data.state_dict(), saved)
    saved.seek(0)
    again = make(tmp_path, corpus, num_workers=workers)
    again.load_state_dict(torch.load(saved, weights_only=True))
    assert again.samples_seen == stop * 8
    same(whole[stop:], take(again, 80 - stop))


def test_the_stream_is_the_documents_in_order(tmp_path, streamed):
    data = make(tmp_path, Hub(streamed, streaming=True))
    texts = [row["text"] for row in Hub(streamed, streaming=True).rows("train")]
    expected = [0]
    for text in texts * 2:
        expected += [*(1 + np.frombuffer(text.encode(), np.uint8).astype(int)), 0]
    steps = (len(expected) - 1) // 32 // 8
    got = [t for _, tokens, _ in take(data, steps) for t in tokens.flatten().tolist()]
    assert got == expected[: len(got)]
    assert steps * 8 * 32 > len(expected) // 2 + 1000  # well into the second pass


def test_a_stream_without_its_state_is_an_error(tmp_path, streamed):
    data = make(tmp_path, Hub(streamed, streaming=True))
    data.load_state_dict({"samples": 8})
    with pytest.raises(UserError, match="no state of the stream after 8 samples"):
        next(iter(data.train_dataloader()))


def test_a_tokenizer_for_a_stream_is_trained_on_its_first_documents(tmp_path, streamed):
    hub = Hub(streamed, streaming=True, validation="train[:5]")
    data = TextData(hub, str(tmp_path), 32, True, None, 4, 0, 2, tokenizer_documents=20)
    data.configure(BPE(300), Causal(), 8, 0).prepare()
    texts = [row["text"] for row in itertools.islice(hub.rows("train"), 20)]
    assert data.tokenizer.fingerprint() == BPE(300).train(iter(texts)).fingerprint()
    assert data.n_blocks is None
    assert data.report.splits["validation"].documents == 5
    assert len(list(data.val_dataloader())) > 0
    with pytest.raises(UserError, match="no end"):
        data.loader("train")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_scores_every_token_once(tmp_path, world_size):
    loaders = [make(tmp_path, rank=r, world_size=world_size).val_dataloader() for r in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    data = make(tmp_path)
    split = data.report.splits["validation"]
    assert sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in batches) == split.tokens - 1
    assert sum(float(b["n_bytes"].sum()) for b in batches) == split.bytes
    labels = torch.cat([b["labels"][b["labels"] != IGNORE_INDEX] for b in batches])
    stream = data._tokens("validation").tokens[1:].astype(np.int64)
    assert sorted(labels.tolist()) == sorted(stream.tolist())
    few = make(tmp_path, validation_blocks=3).val_dataloader()
    assert sum((b["labels"] != IGNORE_INDEX).any(1).sum() for b in few) == 3


def test_an_epoch_covers_the_data_and_the_next_differs(tmp_path):
    data = make(tmp_path, batch_size=1)
    epochs = [torch.cat([t for _, t, _ in take(data, data.n_blocks)])]
    data.advance(data.n_blocks)
    epochs.append(torch.cat([t for _, t, _ in take(data, data.n_blocks)]))
    assert data.n_blocks * 32 > data.report.splits["train"].tokens - 80
    first, second = ({tuple(row) for row in epoch.tolist()} for epoch in epochs)
    assert len(first & second) <= 1


def test_max_samples_repeats(tmp_path):
    data = make(tmp_path)
    data.configure(data.tokenizer, Causal(), 4, 1, max_samples=4)
    steps = take(data, 3)
    assert torch.equal(steps[0][1], steps[2][1])
    assert steps[2][0].tolist() == [0, 1, 2, 3], "the same samples, noise and all"


def test_workers_can_be_spawned(tmp_path):
    loader = make(tmp_path).train_dataloader()
    assert len(pickle.dumps(loader.collated)) < 20_000


def test_a_step_costs_little(tmp_path):
    from lmexp.objective.causal_lm import CausalLM

    data = make(tmp_path, Lists(DOCUMENTS * 20), block_size=64, batch_size=12)
    data.objective = CausalLM()
    batches = iter(data.train_dataloader())
    next(batches)
    times = []
    for _ in range(500):
        start = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.3e-3


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"data.block_size=1; expected a whole number of at least 2"):
        make(tmp_path, block_size=1)
    with pytest.raises(UserError, match=r"train split holds 5 tokens.*block_size=32 needs 33.*block_size=2"):
        make(tmp_path, Lists(["abc"]))
    with pytest.raises(UserError, match=r"batch_size=7 does not divide over 2 devices; set batch_size=6 or 8"):
        make(tmp_path, world_size=2, batch_size=7).train_dataloader()
    with pytest.raises(UserError, match=r"no test split"):
        make(tmp_path).test_dataloader()
    with pytest.raises(UserError, match=r"seed=-1"):
        make(tmp_path, seed=-1)
