"""The shared types: what corpora, tokenizers, objectives, models and schedules promise one another.

This module imports nothing of lmexp and is imported by everything else; read it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not scored."""

Split = Literal["train", "validation", "test"]

Family = Literal["decoder", "encoder", "encoder_decoder"]
"""What a model is: whether it reads both ways, and whether it writes."""

EVAL_SEED = 0
"""Noise of evaluation depends on this and the place of a sample, never on the run's seed: runs compare."""


class UserError(ValueError):
    """A mistake of the user's: its text names the thing, what was expected and the fix. `run.py` exits with 2."""


class StorageError(UserError):
    """A disk that is full or gone while a run writes. `run.py` exits with 1: nothing was asked wrongly."""


class Diverged(UserError):
    """A loss or a gradient that is not finite. Nothing was saved after it."""


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was saved. `run.py` exits with 75."""


class Corpus(Protocol):
    """A provider of raw text (`lmexp/corpus`, no torch): splits of documents."""

    streaming: bool
    """True: `rows` gives an endless or huge iterable that is tokenized on the fly, not cached."""

    def fingerprint(self) -> str:
        """A hash of the content (not of the path): equal text gives an equal fingerprint."""
        ...

    def rows(self, split: Split) -> Any:
        """The split as a `datasets.Dataset` (or `IterableDataset` when streaming) with a string column `text`,
        a document a row. Raises `UserError` if the source is missing, empty or unreadable."""
        ...


@dataclass(frozen=True)
class Sample:
    """One training or evaluation example as it leaves the packed token stream."""

    tokens: np.ndarray
    """(length,) int64: `block_size + 1` token ids in training (inputs and, shifted by one, labels); fewer at the
    end of an evaluation split; none at all where a device has no work left."""

    n_bytes: np.ndarray
    """(length,) float32: UTF-8 bytes of text that each token stands for; 0 for special tokens."""

    index: int
    """The global sample index: with the seed, all that the content and the noise of a sample depend on."""

    documents: np.ndarray | None = None
    """(length,) int64, which document of the block each token belongs to, counted from 0; the token that ends a
    document is its first, because it is what the next one is predicted from. None: no document mask."""

    part: int = 0
    """Which part of a corpus of several (languages, say) it comes from."""

    language: int = 0
    """Which of the corpus's languages its tokens are in."""

    pair: Sample | None = None
    """The same text in another language, or the second text of two; `tokens` and `pair.tokens` then are one whole
    text each, without document ends."""

    label: np.ndarray | None = None
    """Of a text that has one: its class, () int64, or, where it may have several, (classes,) int64 of 0 and 1."""


class _Batch(TypedDict):
    inputs: dict[str, Tensor]
    """Keyword arguments of the model's `forward`. All families: `tokens` (B, T) int64; where texts stand beside one
    another or end early, `documents` (B, T) int64, which text of its row each token is of, -1 for padding, and
    `positions` (B, T) int64, its place in that text. Encoder-decoders: `decoder_tokens` (B, U), and likewise
    `decoder_documents` and `decoder_positions`; a decoder text sees the encoder text of the same number. Decoders
    under a prefix objective: `prefix` (B,) int64, how many first positions see one another both ways. With language
    embeddings: `languages` (B, T)."""

    labels: Tensor
    """(B, U) int64; `IGNORE_INDEX` where nothing is scored. Without `scored`, one for each hidden state."""

    n_bytes: Tensor
    """(B,) int64: UTF-8 bytes of the scored tokens of each row, for bits per byte."""


class Batch(_Batch, total=False):
    """What a collate returns and a task consumes. Every tensor has the rows B first."""

    scored: Tensor
    """(B, K) int64: the positions that `labels` (B, K) belong to, where only few are scored."""

    parts: Tensor
    """(B, labels' width) int64: the part of the corpus each label comes from, where there are several."""

    places: Tensor
    """(B, K) int64, of labelled texts: the place in its split of the one that a row's label k is for. `labels` then is
    (B, K), or (B, K, classes) where a text may have several, and text k is document k of its row."""


Collate = Callable[[Sequence[Sample], int, int], Batch]
"""(samples, block_size, seed) -> batch. All randomness is a function of the seed and each sample's index. Shorter
samples, down to empty ones, are padded and not scored."""


class Objective(Protocol):
    """How samples become inputs and labels (`lmexp/objective`)."""

    families: tuple[Family, ...]
    """The model families that can be trained with it."""

    bits: str | None
    """What nats over bytes mean here: `bits_per_byte` (of a text's probability), a name that says what else it is,
    or None: nothing."""

    reads_pairs: bool
    """Whether it takes samples that have a `pair`."""

    reads_texts: bool
    """Whether it takes samples that have none."""

    @property
    def reads_documents(self) -> bool:
        """Whether it keeps the documents of a block apart."""
        ...

    def special_tokens(self, family: Family) -> tuple[str, ...]:
        """Roles that the tokenizer must have tokens for, such as `mask` or `sentinel_0`; see `Tokenizer.with_roles`."""
        ...

    def sample_length(self, block_size: int) -> int:
        """How many consecutive tokens of the stream a sample of `block_size` inputs needs."""
        ...

    def collate(self, tokenizer: Any, family: Family, start_id: int | None = None) -> Collate:
        """The function from samples to batches, for a tokenizer that has the roles and a family that it trains.

        `start_id`: the token that an encoder-decoder's decoder begins with; None: the tokenizer's padding.
        """
        ...


@runtime_checkable
class ReadsWholeTexts(Protocol):
    """An objective whose samples are whole texts, which may be too long."""

    @property
    def read_texts(self) -> tuple[str, ...]:
        """What it reads of each sample, for reports: source and target, say."""
        ...

    def lost(self, lengths: np.ndarray, block_size: int, family: Family) -> np.ndarray:
        """Tokens cut off of each of `read_texts`, (n, these) int64, where a sample's texts have `lengths` (n, texts)
        tokens."""
        ...

    def read(self, lengths: np.ndarray, block_size: int, family: Family) -> np.ndarray:
        """Tokens (n,) that the model reads of such samples, marks included, of encoder and decoder together."""
        ...


class Schedule(Protocol):
    """A learning-rate multiplier as a pure function of the step (`lmexp/schedule`)."""

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor on the base rate for optimizer step `step`, counted from 0, of `max_steps`; in [0, 1]."""
        ...


@dataclass(frozen=True)
class StepRecord:
    """What a window of training steps measured, read from the device at once."""

    steps: list[int]
    """The steps, counted from 0, that follow."""

    loss: list[float]
    """Nats a scored token in each step's global batch."""

    tokens: list[int]
    """Scored tokens of each step's global batch."""

    positions: list[int]
    """Tokens that the model read in each step's global batch, padding left out."""

    n_bytes: list[float]
    """UTF-8 bytes that these stand for."""

    grad_norm: list[float]
    """Norm of each step's mean gradient, before clipping."""


class MeasuredTask(Protocol):
    """A task that measures its steps on the device (`lmexp/task`)."""

    flops_per_token: float
    """FLOPs that a training step takes for each position of its batch."""

    def read_window(self, step: int) -> StepRecord:
        """What the steps since the last call up to before `step` measured. Collective."""
        ...
