"""Inputs and labels are the sample, shifted; padding is not scored; masks stop at document ends."""

from __future__ import annotations

import numpy as np
import torch

from lmexp.contracts import IGNORE_INDEX, Sample
from lmexp.objective.causal_lm import CausalLM
from lmexp.tokenizer.byte import ByteTokenizer

COLLATE = CausalLM().collate(None, "decoder")


def sample(tokens: list[int], index: int = 0, documents: list[int] | None = None) -> Sample:
    n_bytes = np.array([float(t) for t in tokens], dtype=np.float32)  # as many bytes as the token's id
    ids = None if documents is None else np.array(documents)
    return Sample(np.array(tokens, dtype=np.int64), n_bytes, index, ids)


def test_each_label_is_the_next_token() -> None:
    batch = COLLATE([sample([1, 2, 3, 4, 5]), sample([6, 7, 8, 9, 10])], 4, 0)
    assert batch["inputs"]["tokens"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[2, 3, 4, 5], [7, 8, 9, 10]]
    assert batch["n_bytes"].tolist() == [2 + 3 + 4 + 5, 7 + 8 + 9 + 10]
    assert batch["inputs"].keys() == {"tokens"}


def test_shorter_and_empty_samples_are_padded_and_not_scored() -> None:
    batch = COLLATE([sample([1, 2, 3]), sample([]), sample([4])], 4, 0)
    none = IGNORE_INDEX
    assert batch["labels"].tolist() == [[2, 3, none, none], [none] * 4, [none] * 4]
    assert batch["n_bytes"].tolist() == [5, 0, 0]


def test_positions_start_again_in_each_document() -> None:
    batch = COLLATE([sample([0, 5, 6, 0, 7, 8, 9], documents=[0, 0, 0, 1, 1, 1, 1])], 6, 0)
    assert batch["inputs"]["documents"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch["inputs"]["positions"].tolist() == [[0, 1, 2, 0, 1, 2]]
    padded = COLLATE([sample([0, 5, 6], documents=[0, 0, 0]), sample([], documents=[])], 4, 0)
    assert padded["inputs"]["documents"].tolist() == [[0, 0, 0, -1], [-1] * 4]
    assert torch.equal(padded["inputs"]["positions"][1], torch.arange(4))


def test_rearranging_is_undone_by_reading_the_parts_in_order() -> None:
    tokenizer = ByteTokenizer().with_roles(CausalLM(fim_rate=0.5).special_tokens("decoder"))
    pre, mid, suf = (tokenizer.roles[f"fim_{name}"] for name in ("prefix", "middle", "suffix"))
    counts = {"plain": 0, "psm": 0, "spm": 0}
    settings = CausalLM(fim_rate=0.5, fim_spm_rate=0.25)
    assert settings.sample_length(64) == 62
    collate = settings.collate(tokenizer, "decoder")
    for index in range(2000):
        tokens = np.random.default_rng(index).integers(1, 257, size=62)
        text = Sample(tokens, tokenizer.token_bytes[tokens], index)
        batch = collate([text], 64, 7)
        row = [*batch["inputs"]["tokens"][0].tolist(), int(batch["labels"][0, -1])]
        if row[0] != pre:
            assert row[:62] == tokens.tolist()
            counts["plain"] += 1
            continue
        m, s = row.index(mid), row.index(suf)
        if s == 1:  # <prefix> <suffix> C <middle> A B
            assert row[m + 1 :] + row[2:m] == tokens.tolist()
            counts["spm"] += 1
        else:
            assert row[1:s] + row[m + 1 :] + row[s + 1 : m] == tokens.tolist()
            counts["psm"] += 1
        assert int(batch["n_bytes"][0]) == 62
    assert abs(counts["plain"] / 2000 - 0.5) < 0.04
    assert abs(counts["spm"] / 2000 - 0.125) < 0.03


def test_bits_of_rearranged_text_have_a_name_of_their_own() -> None:
    assert CausalLM().bits == "bits_per_byte"
    assert CausalLM(fim_rate=0.5).bits == "fim_bits_per_byte"
