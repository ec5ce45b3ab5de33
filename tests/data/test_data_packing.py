"""Blocks of a stream, against the stream."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lmexp.data.order import BlockOrder
from lmexp.data.packing import PackedTokens, SequentialTokens, TokenFile, document_ids, evaluation_batches, stride_of

BYTES = np.arange(50, dtype=np.float32)


@pytest.fixture
def stream(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, 403).astype(np.uint16)
    tokens[[0, 50, 51, 200, 402]] = 0
    (tmp_path / "t.bin").write_bytes(tokens.tobytes())
    return TokenFile(tmp_path / "t.bin", "uint16", 403)


def test_packed_samples(stream):
    order = BlockOrder(403, 17, 16, seed=1)
    packed = PackedTokens(stream, BYTES, order)
    indices = [5, 4095, 4096, 4097, 0]
    for sample, index in zip(packed.samples(indices), indices, strict=True):
        start = order.starts(index, 1)[0]
        assert sample.index == index
        assert sample.tokens.dtype == np.int64
        assert (sample.tokens == stream.tokens[start : start + 17]).all()
        assert (sample.n_bytes == BYTES[sample.tokens]).all()
        assert sample.documents is None
    repeated = PackedTokens(stream, BYTES, order, max_samples=3).samples([1, 4, 7])
    assert all((s.tokens == repeated[0].tokens).all() for s in repeated)


def test_documents_against_a_loop():
    tokens = np.array([[7, 0, 3, 0, 0, 5], [0, 1, 2, 3, 4, 0]])
    expected = []
    for row in tokens:
        ids = [0]
        for token in row[1:]:
            ids.append(ids[-1] + (token == 0))
        expected.append(ids)
    assert document_ids(tokens, 0).tolist() == expected == [[0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 0, 1]]


def test_documents_are_given_when_masked(stream):
    packed = PackedTokens(stream, BYTES, BlockOrder(403, 17, 16, seed=1), mask_eos=0)
    for sample in packed.samples(range(20)):
        assert (sample.documents == document_ids(sample.tokens, 0)).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [2, 17, 18, 33, 403])
def test_evaluation_predicts_each_token_once(stream, n_tokens, world_size):
    part = TokenFile(stream.path, "uint16", n_tokens) if n_tokens == 403 else stream
    if n_tokens != 403:
        path = stream.path.with_name("part.bin")
        path.write_bytes(stream.tokens[:n_tokens].tobytes())
        part = TokenFile(path, "uint16", n_tokens)
    source = SequentialTokens(part, BYTES, 17, 16, mask_eos=0)
    batches = [evaluation_batches(len(source), 4, rank, world_size) for rank in range(world_size)]
    assert len({tuple(len(b) for b in rank) for rank in batches}) == 1  # the same count and sizes everywhere
    assert len({len(b) for rank in batches for b in rank}) == 1
    predicted = []
    for rank in batches:
        for batch in rank:
            for sample in source.samples(batch):
                start = sample.index * 16
                predicted += list(range(start + 1, start + len(sample.tokens)))
                assert (sample.tokens == part.tokens[start : start + len(sample.tokens)]).all()
                assert sample.documents is not None
    assert sorted(predicted) == list(range(1, n_tokens))


def test_evaluation_of_some_blocks_is_spread(stream):
    source = SequentialTokens(stream, BYTES, 17, 16, max_blocks=5)
    assert source.blocks.tolist() == [0, 5, 10, 15, 20]
    assert len(list(source)) == 5
    assert len(SequentialTokens(stream, BYTES, 17, 16, max_blocks=1000).blocks) == 26


def test_strides():
    assert stride_of(65, 64) == 64
    assert stride_of(64, 64) == 64
    assert stride_of(80, 64) == 80


def test_a_worker_gets_the_path_and_not_the_tokens(tmp_path):
    (tmp_path / "t.bin").write_bytes(np.arange(10**6, dtype=np.uint32).tobytes())
    stream = TokenFile(tmp_path / "t.bin", "uint32", 10**6)
    assert stream.tokens[-1] == 10**6 - 1
    sent = pickle.dumps(stream)
    assert len(sent) < 1000
    assert pickle.loads(sent).tokens[5] == 5
