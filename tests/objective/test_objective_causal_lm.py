"""Inputs and labels are the sample, shifted; padding is not scored; masks stop at document ends."""

from __future__ import annotations

import numpy as np
import torch

from lmexp.contracts import IGNORE_INDEX, Sample
from lmexp.objective.causal_lm import CausalLM


def sample(tokens: list[int], index: int = 0, documents: list[int] | None = None) -> Sample:
    n_bytes = np.array([float(t) for t in tokens], dtype=np.float32)  # as many bytes as the token's id
    ids = None if documents is None else np.array(documents)
    return Sample(np.array(tokens, dtype=np.int64), n_bytes, index, ids)


def test_each_label_is_the_next_token() -> None:
    batch = CausalLM().collate([sample([1, 2, 3, 4, 5]), sample([6, 7, 8, 9, 10])], 4)
    assert batch["inputs"]["tokens"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[2, 3, 4, 5], [7, 8, 9, 10]]
    assert batch["n_bytes"].tolist() == [2 + 3 + 4 + 5, 7 + 8 + 9 + 10]
    assert batch["inputs"].keys() == {"tokens"}


def test_shorter_and_empty_samples_are_padded_and_not_scored() -> None:
    batch = CausalLM().collate([sample([1, 2, 3]), sample([]), sample([4])], 4)
    none = IGNORE_INDEX
    assert batch["labels"].tolist() == [[2, 3, none, none], [none] * 4, [none] * 4]
    assert batch["n_bytes"].tolist() == [5, 0, 0]


def test_positions_start_again_in_each_document() -> None:
    batch = CausalLM().collate([sample([0, 5, 6, 0, 7, 8, 9], documents=[0, 0, 0, 1, 1, 1, 1])], 6)
    assert batch["inputs"]["documents"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch["inputs"]["positions"].tolist() == [[0, 1, 2, 0, 1, 2]]
    padded = CausalLM().collate([sample([0, 5, 6], documents=[0, 0, 0]), sample([], documents=[])], 4)
    assert padded["inputs"]["documents"].tolist() == [[0, 0, 0, -1], [-1] * 4]
    assert torch.equal(padded["inputs"]["positions"][1], torch.arange(4))
