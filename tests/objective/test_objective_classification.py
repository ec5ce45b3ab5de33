"""Labelled texts as batches, against what each text alone would be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.contracts import IGNORE_INDEX, Sample, UserError
from lmexp.objective.classification import Classification
from lmexp.tokenizer.byte import Byte

BLOCK = 24


def tokenizer(family: str):
    return Byte().train(iter(())).with_roles(Classification().special_tokens(family))  # type: ignore[arg-type]


def sample(tokens: list[int], index: int, label: int, second: list[int] | None = None) -> Sample:
    one = np.array(tokens, dtype=np.int64)
    pair = None
    if second is not None:
        two = np.array(second, dtype=np.int64)
        pair = Sample(two, np.ones(len(two), np.float32), index)
    return Sample(one, np.ones(len(one), np.float32), index, part=index % 2, pair=pair, label=np.array(label))


TEXT = st.lists(st.integers(1, 200), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, st.none() | TEXT), min_size=1, max_size=9), st.sampled_from(["encoder", "decoder"]))
def test_each_text_is_there_whole_and_once(texts: list, family: str) -> None:
    both = texts[0][1] is not None
    samples = [sample(a, i, i % 3, (b or [7]) if both else None) for i, (a, b) in enumerate(texts)]
    known = tokenizer(family)
    first = known.roles["cls"] if family == "encoder" else known.eos_id
    batch = Classification(segments=True).collate(known, family)(samples, BLOCK, 0)  # type: ignore[arg-type]
    inputs = batch["inputs"]
    seen = []
    for r in range(len(batch["labels"])):
        for k, label in enumerate(batch["labels"][r].tolist()):
            of = inputs["documents"][r] == k
            assert (label == IGNORE_INDEX) == (not of.any())
            if label == IGNORE_INDEX:
                continue
            index = int(batch["places"][r, k])
            seen.append(index)
            tokens = inputs["tokens"][r][of].tolist()
            assert inputs["positions"][r][of].tolist() == list(range(len(tokens)))
            assert label == index % 3
            assert batch["parts"][r, k] == index % 2
            a, b = texts[index][0], texts[index][1] or [7]
            if not both:
                assert tokens == [first, *a[: BLOCK - 2], known.eos_id]
                assert not inputs["segments"][r][of].any()
                continue
            room = BLOCK - 3
            kept = (len(a), len(b))
            while sum(kept) > room:  # the longer one first, token by token
                kept = (kept[0] - 1, kept[1]) if kept[0] > kept[1] else (kept[0], kept[1] - 1)
            assert tokens == [first, *a[: kept[0]], known.eos_id, *b[: kept[1]], known.eos_id]
            assert inputs["segments"][r][of].tolist() == [0] * (kept[0] + 2) + [1] * (kept[1] + 1)
    assert sorted(seen) == list(range(len(texts)))


def test_a_decoder_reads_one_place_behind_the_encoder() -> None:
    known = tokenizer("encoder_decoder")
    samples = [sample([5, 6], 0, 0), sample([7, 8, 9], 1, 1)]
    inputs = Classification().collate(known, "encoder_decoder", start_id=99)(samples, 8, 0)["inputs"]
    eos = known.eos_id
    assert inputs["tokens"].tolist() == [[5, 6, eos, 7, 8, 9, eos, 0]]
    assert inputs["decoder_tokens"].tolist()[0][:7] == [99, 5, 6, 99, 7, 8, 9]
    assert torch.equal(inputs["documents"], inputs["decoder_documents"])


def test_several_labels_and_devices_without_work() -> None:
    known = tokenizer("encoder")
    own = Sample(np.array([5]), np.ones(1, np.float32), 4, label=np.array([0, 1, 1]))
    empty = Sample(np.empty(0, np.int64), np.empty(0, np.float32), 9)
    collate = Classification().collate(known, "encoder")
    assert collate([own, empty], 8, 0)["labels"].tolist() == [[[0, 1, 1]]]
    assert collate([empty], 8, 0)["labels"].tolist() == [[IGNORE_INDEX]]


def test_what_is_cut_is_counted() -> None:
    objective = Classification(max_length=10)
    assert objective.lost(np.array([[8], [9], [20]]), 16, "encoder").tolist() == [[0], [1], [12]]
    assert objective.lost(np.array([[3, 4], [9, 9]]), 16, "encoder").tolist() == [[0], [11]]
    assert objective.lost(np.array([[9], [10]]), 16, "encoder_decoder").tolist() == [[0], [1]]


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"objective.max_length=3"):
        Classification(max_length=3)
    with pytest.raises(UserError, match=r"max_length=20 is more than data.block_size=16"):
        Classification(max_length=20).most(16)
