"""Unigram language model tokenizer (Kudo 2018), as SentencePiece has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lmexp.tokenizer.subword import SubwordTokenizer
from lmexp.tokenizer.tokenizer import EOS, UNK, check_vocab_size


@dataclass
class Unigram:
    """The most probable segmentation into pieces; characters outside the training text are unknown."""

    vocab_size: int
    """Tokens, with the two special ones and the alphabet; at least 100."""

    needs_text = True

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size, 100)

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "unigram", **asdict(self)}

    def train(self, texts: Iterator[str], progress: bool = False) -> SubwordTokenizer:
        """Learn the pieces of these documents."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(
            vocab_size=self.vocab_size, special_tokens=[EOS, UNK], unk_token=UNK, show_progress=progress
        )
        backend.train_from_iterator(texts, trainer)
        return SubwordTokenizer(backend, eos=EOS, pad=None, unk=UNK)
