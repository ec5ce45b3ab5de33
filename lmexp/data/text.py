"""Text for language models, from a corpus to batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule

from lmexp.contracts import Objective, UserError
from lmexp.data.cache import SplitCorpus, TokenCache, open_cache, trained_tokenizer
from lmexp.data.loader import Batches, Collated, SizedBatches
from lmexp.data.order import BlockOrder
from lmexp.data.packing import PackedTokens, SequentialTokens, TokenFile, stride_of
from lmexp.data.report import DataReport
from lmexp.data.stream import StreamBatches, TokenStream
from lmexp.tokenizer.tokenizer import Tokenizer, TokenizerConfig


class TextData(LightningDataModule):
    """Packs the documents of a corpus to blocks of tokens.

    What the constructor takes is the `data` node of the configuration; `configure` adds what the run decides, then
    `prepare` makes `tokenizer`, `report`, `n_blocks` and `bytes_per_token`. Training batch s of rank r of W holds the
    samples s * B + r * B / W to s * B + (r + 1) * B / W - 1, for a global batch of B, and starts at the cursor
    `samples_seen`, which `advance` moves once a batch has been trained on and checkpoints keep.
    """

    def __init__(
        self,
        corpus: SplitCorpus,
        cache_dir: str,
        block_size: int,
        document_mask: bool,
        validation_blocks: int | None,
        eval_batch_size: int,
        num_workers: int,
        prefetch: int,
        tokenizer_documents: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 2),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch", prefetch, 1),
            ("tokenizer_documents", tokenizer_documents, 1),
            ("validation_blocks", 1 if validation_blocks is None else validation_blocks, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"data.{name}={value}; expected a whole number of at least {least}.")
        self.corpus = corpus
        self.cache_dir = cache_dir
        self.block_size = block_size
        self.document_mask = document_mask
        self.validation_blocks = validation_blocks
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.tokenizer_documents = tokenizer_documents
        self.samples_seen = 0
        self._stream_states: dict[int, Any] = {}  # samples seen -> where the stream then was

    def configure(
        self,
        tokenizer: Tokenizer | TokenizerConfig,
        objective: Objective,
        batch_size: int,
        seed: int,
        max_samples: int | None = None,
    ) -> TextData:
        """Set what the run decides; returns itself.

        A `Tokenizer` is used as it is (that of a checkpoint), a config is trained or loaded. `batch_size` is global,
        in samples. With `max_samples` training repeats its first so many samples, to overfit on purpose.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}; expected at least 1.")
        if seed < 0:
            raise UserError(f"seed={seed}; expected at least 0.")
        if max_samples is not None and max_samples < 1:
            raise UserError(f"max_samples={max_samples}; expected at least 1, or null for all.")
        self._tokenizer_config = tokenizer
        self.objective = objective
        self.batch_size = batch_size
        self.seed = seed
        self.max_samples = max_samples
        self.sample_length = objective.sample_length(self.block_size)
        return self

    def prepare(self, console: Any = None) -> None:
        """Train the tokenizer and build the token cache where there is none, open it, and check that it suffices.

        Every process calls it; one works, the others wait. `console`, a `rich` one, shows progress.
        """
        config = self._tokenizer_config
        corpus = self.corpus
        if corpus.streaming and self.max_samples is not None:
            raise UserError(f"max_samples={self.max_samples} needs a corpus that is not streamed; choose one, or null.")
        if isinstance(config, Tokenizer):
            self.tokenizer = config
        else:
            source = _FirstDocuments(corpus, self.tokenizer_documents) if corpus.streaming else corpus
            self.tokenizer = trained_tokenizer(config, source, self.cache_dir, console)
        cached = [split for split in corpus.splits if not (corpus.streaming and split == "train")]
        self.cache: TokenCache | None = None
        if cached:
            self.cache = open_cache(corpus, self.tokenizer, cached, self.cache_dir, console)
        if not corpus.streaming:
            self._check_size("train", self._order().n_blocks)

    @property
    def report(self) -> DataReport:
        """What the cached splits hold."""
        if self.cache is None:
            return DataReport({}, self.tokenizer.vocab_size, "", self.cache_dir)
        return self.cache.report

    @property
    def n_blocks(self) -> int | None:
        """Training samples in an epoch; None when streaming."""
        return None if self.corpus.streaming else self._order().n_blocks

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token of the training split, or when streaming, of the first split cached."""
        splits = self.report.splits
        if not splits:
            return float(self.tokenizer.token_bytes.mean())
        return splits["train" if "train" in splits else next(iter(splits))].bytes_per_token

    def train_dataloader(self) -> Batches | StreamBatches:
        """Endless batches of this rank from the cursor on; has no length."""
        size = self._local_batch_size()
        if self.corpus.streaming:
            rank = self._rank()[0]
            return StreamBatches(
                self._stream,
                self.objective,
                self.block_size,
                self.batch_size,
                slice(rank * size, (rank + 1) * size),
                self.prefetch if self.num_workers else 0,
                self._pin_memory,
                self._stream_states.__setitem__,
            )
        packed = PackedTokens(
            self._tokens("train"), self.tokenizer.token_bytes, self._order(), self._mask_eos, self.max_samples
        )
        return Batches(
            Collated(packed, self.objective, self.block_size),
            lambda: self._train_indices(size),
            self.num_workers,
            self.prefetch,
            self._pin_memory,
        )

    def val_dataloader(self) -> SizedBatches:
        """The validation split in order, or `validation_blocks` blocks spread over it."""
        return self.loader("validation", self.validation_blocks)

    def test_dataloader(self) -> SizedBatches:
        """The whole test split in order."""
        return self.loader("test")

    def loader(self, split: str, max_blocks: int | None = None) -> SizedBatches:
        """A split in order, each token after the first predicted once; on W ranks each has every W-th block."""
        if self.corpus.streaming and split == "train":
            raise UserError("A streaming training split has no end to evaluate; choose split=validation.")
        source = SequentialTokens(
            self._tokens(split),
            self.tokenizer.token_bytes,
            self.sample_length,
            stride_of(self.sample_length, self.block_size),
            self._mask_eos,
            max_blocks,
        )
        self._check_size(split, len(source.blocks))
        rank, world_size = self._rank()
        batches = source.batches(self.eval_batch_size, rank, world_size)
        collated = Collated(source, self.objective, self.block_size)
        return SizedBatches(collated, lambda: batches, 0, self.prefetch, self._pin_memory)

    def advance(self, n_samples: int) -> None:
        """Move the cursor: so many more samples of the global order have been trained on."""
        self.samples_seen += n_samples
        for seen in [seen for seen in self._stream_states if seen < self.samples_seen]:
            del self._stream_states[seen]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and when streaming, where the stream was after the last batch trained on."""
        state: dict[str, Any] = {"samples": self.samples_seen}
        if self.corpus.streaming:
            state["stream"] = self._stream_states.get(self.samples_seen)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.samples_seen = state_dict["samples"]
        self._stream_states = {}
        if state_dict.get("stream") is not None:
            self._stream_states[self.samples_seen] = state_dict["stream"]

    @property
    def _mask_eos(self) -> int | None:
        return self.tokenizer.eos_id if self.document_mask else None

    @property
    def _pin_memory(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def _tokens(self, split: str) -> TokenFile:
        if self.cache is None:
            raise UserError(f"The corpus has no {split} split; it has {', '.join(self.corpus.splits)}.")
        return self.cache.stream(split)

    def _order(self) -> BlockOrder:
        stride = stride_of(self.sample_length, self.block_size)
        return BlockOrder(self._tokens("train").n_tokens, self.sample_length, stride, self.seed)

    def _stream(self) -> TokenStream:
        """The training stream at the cursor."""
        state = self._stream_states.get(self.samples_seen)
        if state is None and self.samples_seen:
            raise UserError(
                f"There is no state of the stream after {self.samples_seen} samples; expected that of a run on the "
                "same streaming corpus. Resume with the data configuration of the run."
            )
        rows = partial(self.corpus.rows, "train")
        return TokenStream(rows, self.tokenizer, self.sample_length, self.block_size, self._mask_eos, state)

    def _check_size(self, split: str, n_blocks: int) -> None:
        if n_blocks < 1:
            n = self._tokens(split).n_tokens
            raise UserError(
                f"The {split} split holds {n} tokens, a block of data.block_size={self.block_size} needs "
                f"{self.sample_length}; give the corpus more text, or set data.block_size={max(2, n // 2)} or less."
            )

    def _rank(self) -> tuple[int, int]:
        """(rank, world size), 0 of 1 without a trainer."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _local_batch_size(self) -> int:
        world_size = self._rank()[1]
        if self.batch_size % world_size:
            below = self.batch_size // world_size * world_size
            nearest = " or ".join(str(b) for b in (below, below + world_size) if b)
            raise UserError(
                f"batch_size={self.batch_size} does not divide over {world_size} devices; set batch_size={nearest}."
            )
        return self.batch_size // world_size

    def _train_indices(self, size: int) -> Iterator[range]:
        first = self.samples_seen + self._rank()[0] * size
        while True:
            yield range(first, first + size)
            first += self.batch_size


class _FirstDocuments:
    """The first training documents of a streaming corpus, to train a tokenizer on."""

    streaming = False

    def __init__(self, corpus: SplitCorpus, count: int) -> None:
        self.corpus = corpus
        self.count = count

    def fingerprint(self) -> str:
        return f"{self.corpus.fingerprint()} first {self.count}"

    def rows(self, split: Any) -> Any:
        return self.corpus.rows(split).take(self.count)
