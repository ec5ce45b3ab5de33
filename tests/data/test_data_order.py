"""The block order against brute force."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lmexp.contracts import Sample
from lmexp.data.mixture import Mixed, MixtureOrder, TextOrder
from lmexp.data.order import BlockOrder, keys, permute


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65537, 100_003])
def test_permute_is_a_bijection(n):
    out = permute(np.arange(n), n, keys(n, 0))
    assert (np.sort(out) == np.arange(n)).all()


def test_permute_is_elementwise_and_takes_huge_n():
    n = 10**12 + 39
    items = np.array([0, 1, 5, n - 1, 123456789012 % n])
    out = permute(items, n, keys(1))
    assert ((out >= 0) & (out < n)).all()
    assert (permute(items[::-1].copy(), n, keys(1)) == out[::-1]).all()
    assert (permute(items.reshape(5, 1), n, keys(1)) == out.reshape(5, 1)).all()
    many = permute(np.arange(n - 500, n), n, keys(2))  # few are computed by Python, many by numpy
    assert [permute(np.array([n - 500 + i]), n, keys(2))[0] for i in range(500)] == many.tolist()


def test_permute_looks_uniform():
    """Where item 3 of 10 goes over many keys: chi-square with 9 degrees of freedom; and no trend for large n."""
    n, trials = 10, 4000
    counts = np.bincount([permute(np.array([3]), n, keys(seed))[0] for seed in range(trials)], minlength=n)
    assert ((counts - trials / n) ** 2 / (trials / n)).sum() < 27.9  # p = 0.001
    out = permute(np.arange(50_000), 50_000, keys(7)).astype(float)
    assert abs(np.corrcoef(np.arange(50_000), out)[0, 1]) < 0.02
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02
    # a random permutation has one fixed point on average
    assert (out == np.arange(50_000)).sum() < 8


@pytest.mark.parametrize(
    ("n_tokens", "length", "stride"), [(1000, 9, 8), (9, 9, 8), (17, 9, 8), (1003, 8, 8), (25, 9, 8)]
)
def test_an_epoch_is_disjoint_blocks_within_the_stream(n_tokens, length, stride):
    order = BlockOrder(n_tokens, length, stride, seed=3)
    n = order.n_blocks
    offsets = set()
    for epoch in range(5):
        starts = np.sort(order.starts(epoch * n, n))
        assert starts[0] >= 0
        assert starts[-1] + length <= n_tokens
        assert (np.diff(starts) == stride).all()
        offsets.add(int(starts[0]))
    assert len(offsets) > 1 or n_tokens == length


def test_starts_are_a_pure_function_of_seed_and_index():
    order = BlockOrder(500, 9, 8, seed=3)
    whole = order.starts(0, 400)
    assert all(order.starts(i, 1)[0] == whole[i] for i in range(400))
    assert (order.starts(37, 200) == whole[37:237]).all()
    other = BlockOrder(500, 9, 8, seed=4).starts(0, 400)
    assert (other != whole).any()
    n = order.n_blocks
    assert (whole[:n] != whole[n : 2 * n]).any()
    assert BlockOrder(8, 9, 8, seed=0).n_blocks == 0


def test_memory_does_not_grow_with_the_position() -> None:
    """Bar: of a run of ten million steps; what its time is, benchmarks/positions.py measures."""
    mixed = Mixed([Empty(), Empty()], MixtureOrder((1 - 1e-6, 1e-6), seed=1))
    texts, blocks = TextOrder(10**8, seed=1), BlockOrder(10**10, 1025, 1024, seed=1)
    finders: list[Callable[[int], object]] = [
        lambda position: blocks.starts(position, 64),
        texts.number,
        lambda position: mixed.samples([position]),
    ]
    for find in finders:
        peaks = []
        for positions in (range(5), range(640_000_000 - 5, 640_000_000)):
            tracemalloc.start()
            for position in positions:
                find(position)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert max(peaks) < 400_000
        assert peaks[1] < 1.5 * peaks[0] + 10_000


class Empty:
    def samples(self, indices: Sequence[int]) -> list[Sample]:
        return [Sample(np.empty(0, np.int64), np.empty(0, np.float32), index) for index in indices]
