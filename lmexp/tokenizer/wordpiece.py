"""WordPiece, BERT's tokenizer: longest pieces of lower-cased words (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lmexp.tokenizer.subword import SubwordTokenizer
from lmexp.tokenizer.tokenizer import EOS, UNK, check_vocab_size


@dataclass
class WordPiece:
    """Pieces of words and punctuation; white space is not kept, unknown characters make a word unknown."""

    vocab_size: int
    """Tokens, with the two special ones and the alphabet; at least 100."""

    lowercase: bool = True
    """Lower the case and drop accents, as BERT's uncased models do."""

    needs_text = True

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size, 100)

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "wordpiece", **asdict(self)}

    def train(self, texts: Iterator[str], progress: bool = False) -> SubwordTokenizer:
        """Learn the pieces of these documents."""
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        backend = Tokenizer(models.WordPiece(unk_token=UNK))  # type: ignore[call-arg, unused-ignore]
        backend.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocab_size, special_tokens=[EOS, UNK], show_progress=progress
        )
        backend.train_from_iterator(texts, trainer)
        return SubwordTokenizer(backend, eos=EOS, pad=None, unk=UNK)
