"""Causal language modelling: predict each token from those before it; with text to be filled in, if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from lmexp.contracts import IGNORE_INDEX, Batch, Collate, Family, Sample, UserError
from lmexp.objective.noise import generator


@dataclass(frozen=True)
class CausalLM:
    """Inputs are tokens 0..T-1 of a sample, labels tokens 1..T; loss -sum_t log p(x_t | x_<t).

    With a `fim_rate`, so many samples are cut into prefix, middle and suffix and rearranged, so that the model learns
    to write the middle last (Bavarian et al. 2022, section 3).
    """

    fim_rate: float = 0.0
    """Share of the samples that is rearranged, in [0, 1]."""

    fim_spm_rate: float = 0.5
    """Share of these that put the suffix first (SPM, section 3.1 there), in [0, 1]."""

    families: ClassVar[tuple[Family, ...]] = ("decoder",)
    reads_pairs: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("fim_rate", "fim_spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name}={getattr(self, name)}; expected a share from 0 to 1.")

    @property
    def bits(self) -> str | None:
        """Rearranged, where the text was cut is predicted too: no probability of the text alone."""
        return "fim_bits_per_byte" if self.fim_rate else "bits_per_byte"

    @property
    def reads_documents(self) -> bool:
        """Whether it keeps the documents of a block apart; rearranged, they are not."""
        return not self.fim_rate

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        return ("fim_prefix", "fim_middle", "fim_suffix") if self.fim_rate else ()

    def sample_length(self, block_size: int) -> int:
        """Tokens of the stream that a sample of `block_size` inputs needs: one more, the last label; less the three
        that rearranging adds."""
        return block_size + 1 - len(self.special_tokens("decoder"))

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        return _Rearranging(self, tokenizer) if self.fim_rate else _stacked


def _stacked(samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
    """Stack samples to a batch (B, block_size); shorter samples are padded with token 0 and not scored."""
    length = block_size + 1
    if all(len(sample.tokens) == length for sample in samples):
        tokens = np.stack([sample.tokens for sample in samples])
        labels = tokens[:, 1:]
        n_bytes = np.stack([sample.n_bytes for sample in samples])[:, 1:].sum(1)
    else:
        tokens = np.zeros((len(samples), length), dtype=np.int64)
        labels = np.full((len(samples), block_size), IGNORE_INDEX, dtype=np.int64)
        n_bytes = np.zeros(len(samples))
        for row, sample in enumerate(samples):
            n = len(sample.tokens)
            tokens[row, :n] = sample.tokens
            labels[row, : max(0, n - 1)] = sample.tokens[1:]
            n_bytes[row] = sample.n_bytes[1:].sum()
    inputs = {"tokens": torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))}
    if any(sample.documents is not None for sample in samples):
        documents, positions = _documents(samples, block_size)
        inputs |= {"documents": documents, "positions": positions}
    batch: Batch = {
        "inputs": inputs,
        "labels": torch.from_numpy(np.ascontiguousarray(labels)),
        "n_bytes": torch.from_numpy(n_bytes.astype(np.int64)),
    }
    if any(sample.part for sample in samples):
        batch["parts"] = torch.tensor([[sample.part] for sample in samples]).expand(-1, block_size).contiguous()
    return batch


class _Rearranging:
    def __init__(self, settings: CausalLM, tokenizer: Any) -> None:
        self.settings = settings
        self.ids = [tokenizer.roles[role] for role in settings.special_tokens("decoder")]

    def __call__(self, samples: Sequence[Sample], block_size: int, seed: int) -> Batch:
        return _stacked([self.rearranged(sample, seed) for sample in samples], block_size, seed)

    def rearranged(self, sample: Sample, seed: int) -> Sample:
        """<prefix> A <suffix> C <middle> B, or <prefix> <suffix> C <middle> A B; or the sample as it is."""
        rng = generator(seed, sample.index)
        n = len(sample.tokens)
        if rng.random() >= self.settings.fim_rate or n < 2:
            return sample
        suffix_first = rng.random() < self.settings.fim_spm_rate
        a, b = np.sort(rng.integers(0, n + 1, size=2))
        before, within, after = np.split(np.arange(n), [a, b])
        prefix, middle, suffix = (np.array([place]) for place in (-1, -2, -3))
        order = (
            (prefix, suffix, after, middle, before, within)
            if suffix_first
            else (prefix, before, suffix, after, middle, within)
        )
        places = np.concatenate(order)
        prefix_id, middle_id, suffix_id = self.ids
        tokens = np.append(sample.tokens, [suffix_id, middle_id, prefix_id])[places]
        n_bytes = np.append(sample.n_bytes, np.zeros(3, dtype=sample.n_bytes.dtype))[places]
        return replace(sample, tokens=tokens, n_bytes=n_bytes, documents=None)


def _documents(samples: Sequence[Sample], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which document each input belongs to, and its position within it, both (B, block_size) int64.

    Padding is a document of its own (-1), so that no real token attends to it or the other way round.
    """
    documents = np.full((len(samples), block_size), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        if sample.documents is not None:
            n = min(len(sample.documents), block_size)
            documents[row, :n] = sample.documents[:n]
    columns = np.broadcast_to(np.arange(block_size), documents.shape)
    first = np.zeros_like(documents)
    starts = documents[:, 1:] != documents[:, :-1]
    first[:, 1:] = np.where(starts, columns[:, 1:], 0)
    positions = columns - np.maximum.accumulate(first, axis=1)
    return torch.from_numpy(documents), torch.from_numpy(positions)
