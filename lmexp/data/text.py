"""Text for language models, from a corpus to batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from lightning.pytorch import LightningDataModule

from lmexp.contracts import EVAL_SEED, Batch, Family, Objective, ReadsWholeTexts, Sample, Split, UserError
from lmexp.corpus.labelled import COLUMNS
from lmexp.corpus.parts import Part, smoothed
from lmexp.corpus.parts import Side as CorpusSide
from lmexp.data.budget import TokenBudget
from lmexp.data.cache import SplitCorpus, TokenCache, open_cache, trained_tokenizer
from lmexp.data.labelled import AllTexts, Examples, is_labelled, labels_of
from lmexp.data.loader import Batches, Collated, Recipe, SizedBatches, data_share
from lmexp.data.mixture import InTurn, Mixed, MixtureOrder, Pairs, Side, SizedSource, Source, Tagged, TextSource
from lmexp.data.order import BlockOrder
from lmexp.data.packing import PackedTokens, SequentialTokens, TokenFile, evaluation_batches, stride_of
from lmexp.data.parted import SmoothedTexts, is_parted, parts_of
from lmexp.data.report import DataReport, Lengths, SplitReport
from lmexp.data.resplit import Resplit
from lmexp.data.stream import StreamBatches, TokenStream
from lmexp.tokenizer.tokenizer import Tokenizer, TokenizerConfig


class TextData(LightningDataModule):
    """Packs the documents of a corpus to blocks of tokens.

    What the constructor takes is the `data` node of the configuration; `configure` adds what the run decides, then
    `prepare` makes `tokenizer`, `report`, `n_blocks` and `bytes_per_token`. Training batch s of rank r of W holds the
    samples s * B + r * B / W to s * B + (r + 1) * B / W - 1, for a global batch of B, and starts at the cursor
    `samples_seen`, which `advance` moves once a batch has been trained on and checkpoints keep. With `batch_tokens` a
    batch has as many samples as fit (`TokenBudget`), and r of W gets the same share of them.
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
        bpe_dropout: float = 0.0,
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 2),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch", prefetch, 1),
            ("tokenizer_documents", tokenizer_documents, 1),
            ("batch_tokens", 1 if batch_tokens is None else batch_tokens, 1),
            ("validation_blocks", 1 if validation_blocks is None else validation_blocks, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"data.{name}={value}; expected a whole number of at least {least}.")
        if not isinstance(bpe_dropout, (int, float)) or not 0 <= bpe_dropout < 1:
            raise UserError(
                f"data.bpe_dropout={bpe_dropout}; expected a probability of at least 0 and below 1, for example 0.05."
            )
        self.corpus = corpus
        self.cache_dir = cache_dir
        self.block_size = block_size
        self.document_mask = document_mask
        self.validation_blocks = validation_blocks
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.tokenizer_documents = tokenizer_documents
        self.bpe_dropout = bpe_dropout
        self.batch_tokens = batch_tokens
        self.samples_seen = 0
        self.from_sample = 0
        """A checkpoint's cursor goes at least here: the samples before are passed over."""
        self._stream_states: dict[int, Any] = {}  # samples seen -> where the stream then was
        self._originals: dict[str, list[list[Any]]] = {}  # split -> part -> side -> rows

    def configure(
        self,
        tokenizer: Tokenizer | TokenizerConfig,
        objective: Objective,
        batch_size: int | None,
        seed: int,
        max_samples: int | None = None,
        family: Family = "decoder",
        start_id: int | None = None,
    ) -> TextData:
        """Set what the run decides; returns itself.

        A `Tokenizer` is used as it is (that of a checkpoint), a config is trained or loaded; both get the special
        tokens of the objective. `batch_size` is global, in samples; None with `batch_tokens`. With `max_samples`
        training repeats its first so many samples, to overfit on purpose. `family` is the model's, and so is
        `start_id`, the token that its decoder begins with after an encoder; None: the tokenizer's padding.
        """
        if batch_size is not None and batch_size < 1:
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
        self.family = family
        self.start_id = start_id
        self.sample_length = objective.sample_length(self.block_size)
        return self

    def prepare(self, console: Any = None) -> None:
        """Train the tokenizer and build the token cache where there is none, open it, and check that it suffices.

        Every process calls it; one works, the others wait. `console`, a `rich` one, shows progress.
        """
        corpus = self.corpus
        if corpus.streaming and self.max_samples is not None:
            raise UserError(f"max_samples={self.max_samples} needs a corpus that is not streamed; choose one, or null.")
        self.tokenizer = self._tokenizer(console).with_roles(self.objective.special_tokens(self.family))
        if self.bpe_dropout and not len(self._merges()):
            raise UserError(
                f"data.bpe_dropout={self.bpe_dropout} needs a tokenizer of merges (tokenizer=bpe, or a pretrained one "
                "of that kind); this one has none. Choose one, or set data.bpe_dropout=0."
            )
        cached = [split for split in corpus.splits if not (corpus.streaming and split == "train")]
        self._caches: list[tuple[TokenCache, ...]] = []
        if cached:
            self._caches = [
                tuple(open_cache(side, self.tokenizer, cached, self.cache_dir, console) for side in part.corpora)
                for part in self.parts
            ]
        if not corpus.streaming and "train" in corpus.splits:
            for part, n in zip(self.parts, self._sizes(), strict=True):
                self._check_size("train", n, part)

    def _tokenizer(self, console: Any) -> Tokenizer:
        config, corpus = self._tokenizer_config, self.corpus
        if isinstance(config, Tokenizer):
            return config
        source: Any = corpus
        if corpus.streaming:
            source = _FirstDocuments(corpus, self.tokenizer_documents)
        elif is_parted(corpus):
            source = SmoothedTexts(corpus)  # type: ignore[arg-type]
        elif is_labelled(corpus):
            source = AllTexts(corpus)  # type: ignore[arg-type]
        return trained_tokenizer(config, source, self.cache_dir, console)

    @cached_property
    def parts(self) -> list[Part]:
        """The parts of a corpus of several; the whole of any other."""
        return parts_of(self.corpus)

    @property
    def part_names(self) -> tuple[str, ...]:
        """What the parts are called."""
        return tuple(part.name for part in self.parts)

    @property
    def shares(self) -> tuple[float, ...]:
        """The probability of each part in training: its tokens to the power of the corpus's alpha, normalised."""
        split = "train" if "train" in self.corpus.splits else self.corpus.splits[0]
        tokens = [sum(cache.report.splits[split].tokens for cache in caches) for caches in self._caches]
        return tuple(smoothed(tokens, getattr(self.corpus, "alpha", 1.0)))

    def drawn(self) -> dict[str, int]:
        """How many samples of each part have been trained on; empty for a corpus without parts."""
        if not is_parted(self.corpus):
            return {}
        counts = MixtureOrder(self.shares, self.seed).counts(self.samples_seen)
        return dict(zip(self.part_names, counts.tolist(), strict=True))

    @property
    def report(self) -> DataReport:
        """What the cached splits hold."""
        if not self._caches:
            return DataReport({}, self.tokenizer.vocab_size, "", self.cache_dir)
        if not is_parted(self.corpus):
            return self._caches[0][0].report if len(self._caches[0]) == 1 else self._report_of_two()
        splits: dict[str, SplitReport] = {}
        shares: dict[str, float] = {}
        for part, caches, share in zip(self.parts, self._caches, self.shares, strict=True):
            for side, (language, cache) in enumerate(zip(part.languages, caches, strict=True)):
                name = f"{part.name} ({language})" if len(caches) > 1 else part.name
                splits |= {f"{split} {name}": r for split, r in cache.report.splits.items()}
                if side == 0:
                    shares[f"train {name}"] = share
        sample = self._caches[0][0].report.sample
        return DataReport(splits, self.tokenizer.vocab_size, sample, self.cache_dir, shares)

    def _report_of_two(self) -> DataReport:
        """Of two texts a row."""
        first, second = (cache.report for cache in self._caches[0])
        splits = {
            f"{split} {name}": r
            for name, report in zip(COLUMNS, (first, second), strict=True)
            for split, r in report.splits.items()
        }
        return DataReport(splits, self.tokenizer.vocab_size, first.sample, self.cache_dir)

    @property
    def n_blocks(self) -> int | None:
        """Training samples that there are; None when streaming."""
        return None if self.corpus.streaming else sum(self._sizes())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token of the training split, or when streaming, of the first split cached."""
        splits = self.report.splits
        if not splits:
            return float(self.tokenizer.token_bytes.mean())
        wanted = [r for name, r in splits.items() if name.startswith("train")] or [next(iter(splits.values()))]
        return sum(r.bytes for r in wanted) / sum(r.tokens for r in wanted)

    def train_dataloader(self) -> Batches | StreamBatches:
        """Endless batches of this rank from the cursor on; has no length."""
        recipe = self._recipe(self.seed)
        rank, world_size = self._rank()
        assert (self.batch_size is None) != (self.batch_tokens is None), "a batch has one size"  # the job has checked
        if self.batch_size is not None and self.batch_size % world_size:
            below = self.batch_size // world_size * world_size
            nearest = " or ".join(str(b) for b in (below, below + world_size) if b)
            raise UserError(
                f"batch_size={self.batch_size} does not divide over {world_size} devices; set batch_size={nearest}."
            )
        if self.corpus.streaming:
            assert self.batch_size is not None  # no objective of whole texts reads a stream
            size = self.batch_size // world_size
            return StreamBatches(
                self._stream,
                recipe,
                self.batch_size,
                slice(rank * size, (rank + 1) * size),
                self.prefetch if self.num_workers else 0,
                self._pin_memory,
                self._stream_states.__setitem__,
            )
        return Batches(
            Collated(self._train_source(), recipe),
            lambda: self._train_indices(rank, world_size),
            self.num_workers,
            self.prefetch,
            self._pin_memory,
        )

    def one_by_one(self, indices: Iterable[int]) -> Iterator[tuple[int, Batch]]:
        """Training samples of a corpus that is not streamed, each as a batch by itself."""
        source, recipe = self._train_source(), self._recipe(self.seed)
        return ((index, recipe(source.samples([index]))) for index in indices)

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
        sources = []
        for number, part in enumerate(self.parts):
            sources.append(self._evaluation_source(number, split, max_blocks))
            self._check_size(split, len(sources[-1]), part)
        source: SizedSource = InTurn(sources, max_blocks) if is_parted(self.corpus) else sources[0]
        rank, world_size = self._rank()
        batches = evaluation_batches(len(source), self.eval_batch_size, rank, world_size)
        collated = Collated(source, self._recipe(EVAL_SEED))
        return SizedBatches(collated, lambda: batches, 0, self.prefetch, self._pin_memory)

    def pairs(self, split: str, most: int | None = None) -> list[tuple[int, Sample]]:
        """This rank's share of a split's pairs, every W-th of all, or of `most` spread over each part; each with its
        place among all."""
        sources = [self._evaluation_source(number, split, None) for number in range(len(self.parts))]
        source = InTurn(sources, most)
        rank, world_size = self._rank()
        places = range(rank, len(source), world_size)
        return list(zip(places, source.samples(places), strict=True))

    def original(self, split: str, sample: Sample) -> tuple[str, str]:
        """The text that a pair of a split was made of, and its translation, as the corpus has them."""
        if split not in self._originals:
            rows = [[side.rows(cast(Split, split)) for side in part.corpora] for part in self.parts]
            self._originals[split] = rows
        first, second = (rows[sample.index]["text"] for rows in self._originals[split][sample.part])
        return first, second

    def labels(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The labels (n,) or (n, classes) and groups (n,) of a split whose texts have some; see `labels_of`."""
        return labels_of(self.corpus, cast(Split, split))  # type: ignore[arg-type]

    def lengths(self) -> dict[str, Lengths]:
        """How long whole texts are, and what of them is too long to be read: the split and what is read; empty for
        objectives that read all of any text."""
        objective = self.objective
        if not isinstance(objective, ReadsWholeTexts):
            return {}
        found: dict[str, Lengths] = {}
        for part, caches in zip(self.parts, self._caches, strict=True):
            for split in caches[0].report.splits:
                lengths = np.stack([np.diff(cache.offsets(split)) - 1 for cache in caches], 1)
                lost = objective.lost(lengths, self.block_size, self.family)
                if lost.shape[1] < lengths.shape[1]:  # read as one
                    lengths = lengths.sum(1, keepdims=True)
                for number, name in enumerate(objective.read_texts):
                    of = f"{split} {part.name} {name}" if is_parted(self.corpus) else f"{split} {name}"
                    found[of] = Lengths.of(lengths[:, number], lost[:, number])
        return found

    def left_out(self) -> dict[str, tuple[int, int]]:
        """Where rows are no pairs, as a text of theirs is empty: the split -> how many, and how many rows there are."""
        found: dict[str, tuple[int, int]] = {}
        for part, caches in zip(self.parts, self._caches, strict=True):
            first = part.corpora[0]
            if len(part.corpora) < 2 or not isinstance(first, CorpusSide):
                continue
            for split, report in caches[0].report.splits.items():
                if count := first.left_out(cast(Split, split)):
                    found[f"{split} {part.name}"] = count, count + report.documents
        return found

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last sample of the training batch at the cursor, over all devices."""
        return self.samples_seen, self.samples_seen + self._size_at(self.samples_seen) - 1

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
        self.samples_seen = max(state_dict["samples"], self.from_sample)
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

    def _recipe(self, seed: int) -> Recipe:
        return Recipe(self.objective, self.tokenizer, self.family, self.block_size, seed, self.start_id)

    def _tokens(self, split: str, part: int = 0, side: int = 0) -> TokenFile:
        if not self._caches:
            raise UserError(f"The corpus has no {split} split; it has {', '.join(self.corpus.splits)}.")
        return self._caches[part][side].stream(split)

    def _sides(self, split: str, part: int) -> tuple[Side, Side]:
        first, second = (
            Side(cache.stream(split), cache.offsets(split), self.corpus.languages.index(language))  # type: ignore[attr-defined]
            for cache, language in zip(self._caches[part], self.parts[part].languages, strict=True)
        )
        return first, second

    def _examples(self, split: str, seed: int | None, most: int | None) -> Examples:
        labels, groups = self.labels(split)
        sides = [Side(cache.stream(split), cache.offsets(split), 0) for cache in self._caches[0]]
        return Examples(sides, self.tokenizer.token_bytes, labels, groups, seed, most)

    def _train_source(self) -> Source:
        """Training samples, whole texts cut in other ways too, if that is asked for."""
        source = self._train_texts()
        if not self.bpe_dropout:
            return source
        assert isinstance(self.objective, ReadsWholeTexts)  # the job has checked
        lost = partial(self.objective.lost, block_size=self.block_size, family=self.family)
        return Resplit(source, self._merges(), self.tokenizer.token_bytes, self.bpe_dropout, self.seed, lost)

    def _train_texts(self) -> Source:
        if is_labelled(self.corpus):
            return self._examples("train", self.seed, self.max_samples)
        sources: list[Source] = []
        for number, part in enumerate(self.parts):
            if len(part.languages) > 1:
                sources.append(Pairs(self._sides("train", number), self.tokenizer.token_bytes, number, self.seed))
                continue
            repeated = None if is_parted(self.corpus) else self.max_samples
            order = self._order(number)
            stream = self._tokens("train", number)
            sources.append(PackedTokens(stream, self.tokenizer.token_bytes, order, self._mask_eos, repeated))
        if not is_parted(self.corpus):
            return sources[0]
        tagged = [self._tagged(source, number) for number, source in enumerate(sources)]
        return Mixed(tagged, MixtureOrder(self.shares, self.seed), self.max_samples)

    def _merges(self) -> np.ndarray:
        merges = self.tokenizer.merges()
        return np.empty((0, 3), dtype=np.int64) if merges is None else merges

    def _evaluation_source(self, number: int, split: str, max_blocks: int | None) -> SizedSource:
        if is_labelled(self.corpus):
            self._tokens(split)  # there must be such a split
            return self._examples(split, None, max_blocks)
        if len(self.parts[number].languages) > 1:
            return Pairs(self._sides(split, number), self.tokenizer.token_bytes, number, None)
        stride = stride_of(self.sample_length, self.block_size)
        stream = self._tokens(split, number)
        most = None if is_parted(self.corpus) else max_blocks
        source = SequentialTokens(stream, self.tokenizer.token_bytes, self.sample_length, stride, self._mask_eos, most)
        return self._tagged(source, number)

    def _tagged(self, source: Any, number: int) -> Any:
        """A source of one language with its tags; pairs have theirs, and a corpus without parts needs none."""
        if isinstance(source, Pairs) or not is_parted(self.corpus):
            return source
        language = self.corpus.languages.index(self.parts[number].languages[0])  # type: ignore[attr-defined]
        return Tagged(source, number, language)

    def _order(self, part: int = 0) -> BlockOrder:
        stride = stride_of(self.sample_length, self.block_size)
        return BlockOrder(self._tokens("train", part).n_tokens, self.sample_length, stride, self.seed)

    def _sizes(self) -> list[int]:
        """Training samples of each part."""
        return [
            caches[0].report.splits["train"].documents
            if len(caches) > 1 or is_labelled(self.corpus)
            else self._order(number).n_blocks
            for number, caches in enumerate(self._caches)
        ]

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

    def _check_size(self, split: str, n_blocks: int, part: Part) -> None:
        if n_blocks < 1:
            n = self._tokens(split, self.parts.index(part)).n_tokens
            of = f" of {part.name}" if is_parted(self.corpus) else ""
            raise UserError(
                f"The {split} split{of} holds {n} tokens, a block of data.block_size={self.block_size} needs "
                f"{self.sample_length}; give the corpus more text, or set data.block_size={max(2, n // 2)} or less."
            )

    def _rank(self) -> tuple[int, int]:
        """(rank, world size) among those that share out the batch, 0 of 1 without a trainer."""
        return (0, 1) if self.trainer is None else data_share(self.trainer)

    def _size_at(self, first: int) -> int:
        """Samples of the global batch that begins with this one."""
        return self._budget.size(first) if self.batch_size is None else self.batch_size

    @cached_property
    def _budget(self) -> TokenBudget:
        assert self.batch_tokens is not None
        source = cast(TextSource, self._train_source())
        return TokenBudget(lambda indices: self._tokens_of(source.lengths(indices)), self.batch_tokens)

    def _tokens_of(self, lengths: np.ndarray) -> np.ndarray:
        """(n,) tokens that the model reads of samples whose texts have these lengths (n, texts)."""
        assert isinstance(self.objective, ReadsWholeTexts)  # the job has checked
        return self.objective.read(lengths, self.block_size, self.family)

    def check_budget(self, devices: int) -> None:
        """Raise `UserError` unless a batch has room for a training sample on each device; after `prepare`."""
        tokens = self.batch_tokens
        if tokens is None:
            return
        lengths = [np.stack([np.diff(cache.offsets("train")) - 1 for cache in caches], 1) for caches in self._caches]
        if self.bpe_dropout:  # cut anew, any text may be as long as there is room for
            lengths = [np.full_like(of[:1], 2 * self.block_size) for of in lengths]
        longest = max(int(self._tokens_of(of).max()) for of in lengths)
        if tokens < longest * devices:
            each = f", and each of {devices} devices gets one" if devices > 1 else ""
            raise UserError(
                f"data.batch_tokens={tokens}: the longest training sample has {longest} tokens{each}; set "
                f"data.batch_tokens={longest * devices} or more."
            )

    def _train_indices(self, rank: int, world_size: int) -> Iterator[range]:
        first = self.samples_seen
        while True:
            size = self._size_at(first)
            yield range(first + rank * size // world_size, first + (rank + 1) * size // world_size)
            first += size


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
