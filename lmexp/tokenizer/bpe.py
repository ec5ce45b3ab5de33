"""Byte-level byte pair encoding (Sennrich et al. 2016, over bytes as in GPT-2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lmexp.contracts import UserError
from lmexp.tokenizer.subword import SubwordTokenizer
from lmexp.tokenizer.tokenizer import EOS, check_vocab_size


@dataclass
class BPE:
    """Merges of bytes learned on the training split; words are cut as GPT-2 does. Spells any text."""

    vocab_size: int
    """Tokens, with the 256 bytes and the document end; at least 257. Fewer come out of a small text."""

    min_frequency: int = 2
    """A pair must occur this often to be merged; at least 1."""

    needs_text = True

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size, 257)
        if self.min_frequency < 1:
            raise UserError(f"tokenizer.min_frequency={self.min_frequency}; expected at least 1, for example 2.")

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "bpe", **asdict(self)}

    def train(self, texts: Iterator[str], progress: bool = False) -> SubwordTokenizer:
        """Learn the merges of these documents."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=[EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=progress,
        )
        backend.train_from_iterator(texts, trainer)
        return SubwordTokenizer(backend, eos=EOS, pad=None, unk=None)
