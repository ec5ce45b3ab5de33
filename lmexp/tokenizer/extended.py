"""Words that a trained vocabulary spells in pieces, as tokens of their own after its last id.

A new word is matched as a whole word only, never inside a longer one, so that all other text is spelled as before.
How depends on the vocabulary:

- Byte-level BPE that cuts text into words first (GPT-2, Llama 3, ours): a word is what it cuts out, with the space
  before it, and becomes an entry of the vocabulary that no merge leads to. `ignore_merges` has the library take a word
  that stands in the vocabulary before it merges anything. (The library's added tokens cannot do this: `single_word`
  refuses " word" after a letter, and without it " word" is found in " words".)
- All others: an added token of the library with `single_word`, which must not touch a letter, digit or `_`; the space
  before it stays a token where it was one.

Adding the words that a domain's text is most fragmented by: Hong et al. 2021, AVocaDo. Their first rows in a model:
`lmexp/model/surgery.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmexp.contracts import UserError
from lmexp.tokenizer.pretrained import Pretrained
from lmexp.tokenizer.subword import SubwordTokenizer, _byte_alphabet
from lmexp.tokenizer.tokenizer import FILE_NAME, Tokenizer

if TYPE_CHECKING:
    import tokenizers

_CHUNK = re.compile(r"\s?\S+")  # a word with what touches it; few different ones make up a text
_WORD = re.compile(r"\w+")
_BATCH = 2**14  # chunks that are encoded at once with their offsets, which take some 1000 bytes each


@dataclass
class Extended:
    """A trained tokenizer with more words. All ids of the base, special ones too, keep their meaning."""

    base: str | None
    """The trained tokenizer: a run directory or a checkpoint in it, a tokenizer.json (of the tokenizers library or of
    ours), a folder that holds one, or a name on the hub. Subword tokenizers only."""

    tokens: list[str] | None = None
    """Words to add. Byte-level vocabularies get each with a space before it and without, one that begins with a space
    only so; words that are tokens already are left out. None: words are learned."""

    n_tokens: int = 1000
    """How many to learn from the training text where `tokens` is None: those that save most tokens; at least 1."""

    min_frequency: int = 10
    """A word must occur this often in the training text to be learned; at least 1."""

    eos: str | None = None
    """The token that ends a document, where the base is not of ours; see `Pretrained`."""

    def __post_init__(self) -> None:
        if not self.base:
            raise UserError(
                "tokenizer.base is not given; expected a run directory, a tokenizer.json, a folder that holds one, or "
                "a name on the Hugging Face hub: tokenizer.base=gpt2."
            )
        if self.tokens is not None:
            self.tokens = [str(token) for token in self.tokens]
            if not self.tokens or not all(token.strip() for token in self.tokens):
                raise UserError(
                    f"tokenizer.tokens={self.tokens}; expected words, tokenizer.tokens=[word,other], or null to learn "
                    "them."
                )
        for key in ("n_tokens", "min_frequency"):
            if getattr(self, key) < 1:
                raise UserError(f"tokenizer.{key}={getattr(self, key)}; expected at least 1.")

    @property
    def needs_text(self) -> bool:
        """Whether words are learned."""
        return self.tokens is None

    @property
    def key(self) -> dict[str, Any]:
        learned = {"n_tokens": self.n_tokens, "min_frequency": self.min_frequency} if self.tokens is None else {}
        return {"kind": "extended", "base": self._pretrained().key, "tokens": self.tokens, **learned}

    def _pretrained(self) -> Pretrained:
        """The base as it is loaded; a checkpoint and its folder stand for their run's tokenizer.json."""
        path = Path(str(self.base)).expanduser()
        place = path
        if path.is_file() and path.suffix == ".ckpt":
            place = path.parent
        if place.is_dir():
            homes = (place, place.parent) if place.name == "checkpoints" else (place,)
            place = next((home / FILE_NAME for home in homes if (home / FILE_NAME).is_file()), place)
            if place.is_dir():
                raise UserError(
                    f"tokenizer.base={self.base}: there is no {FILE_NAME} in {homes[-1]}; give a run directory or "
                    "folder that holds one, or the file itself."
                )
        return Pretrained(str(place) if place.exists() else str(self.base), self.eos)

    def train(self, texts: Iterator[str], progress: bool = False) -> SubwordTokenizer:
        """The base with the words given, or learned from these documents."""
        try:
            base = self._pretrained().train(iter(()))
        except UserError as error:
            raise UserError(str(error).replace("tokenizer.path", "tokenizer.base")) from error
        if not isinstance(base, SubwordTokenizer):
            raise UserError(
                f"tokenizer.base={self.base} is a {type(base).__name__}; words can be added to subword tokenizers "
                "only: give the run of one (tokenizer=bpe, unigram, wordpiece or pretrained)."
            )
        whole = takes_whole_words(base)
        if self.tokens is None:
            saved = (
                _saved_by_words(base, texts, self.min_frequency) if whole else _saved(base, texts, self.min_frequency)
            )
            # words do not overlap: what one saves does not depend on the others, so the greedy choice is this order
            words = sorted(saved, key=lambda word: (-saved[word], word))[: self.n_tokens]
            if not words:
                raise UserError(
                    f"No word of the training text that occurs {self.min_frequency} times would save {self.base} a "
                    "token; lower tokenizer.min_frequency, or use the base as it is with tokenizer=pretrained "
                    f"tokenizer.path={self.base}."
                )
        else:
            words = _whole(base, self.tokens) if whole else _single(base, self.tokens)
            if not words:
                raise UserError(
                    f"tokenizer.tokens={self.tokens} are tokens of {self.base} already; give other words, or use it as "
                    f"it is with tokenizer=pretrained tokenizer.path={self.base}."
                )
        return _with_entries(base, words) if whole else _with_added_tokens(base, words)


@dataclass(frozen=True)
class Report:
    """How long texts are with one tokenizer and with another."""

    words: int
    """Runs of letters and digits in the texts."""

    n_bytes: int
    """UTF-8 bytes of the texts."""

    tokens: tuple[int, int]
    """Tokens of the texts, before and after."""

    @property
    def tokens_per_word(self) -> tuple[float, float]:
        """Before and after; all tokens count, those of spaces and punctuation too."""
        return self.tokens[0] / max(self.words, 1), self.tokens[1] / max(self.words, 1)

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Before and after."""
        return self.n_bytes / max(self.tokens[0], 1), self.n_bytes / max(self.tokens[1], 1)


def report(old: Tokenizer, new: Tokenizer, texts: Sequence[str]) -> Report:
    """Measure two tokenizers on texts, best those of a split that none of them has learned from."""
    before, after = (sum(len(ids) for ids in tokenizer.encode(texts)) for tokenizer in (old, new))
    words = sum(len(_WORD.findall(text)) for text in texts)
    return Report(words, sum(len(text.encode()) for text in texts), (before, after))


def pieces(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each id that `new` has after those of `old`: the ids that `old` spells its text with; none for special
    tokens.

    What `grow_vocabulary` (lmexp/model/surgery.py) begins the new rows with. Raises `UserError` unless all ids of
    `old` mean the same in `new`.
    """
    if not extends(old, new):
        raise UserError(
            "The tokenizer is not the old one with tokens after its end, so the rows of the old weights would stand "
            "for other tokens. Extend the tokenizer of the run that the weights are from: tokenizer=extended "
            "tokenizer.base=RUN_DIRECTORY."
        )
    ids = range(old.vocab_size, new.vocab_size)
    texts = [new.decode([i]) if new.token_bytes[i] else "" for i in ids]
    return [encoded.tolist() for encoded in old.encode(texts)]


def extends(old: Tokenizer, new: Tokenizer) -> bool:
    """Whether every id of `old` means the same in `new`."""
    if type(old) is not type(new):
        return False
    if isinstance(old, SubwordTokenizer) and isinstance(new, SubwordTokenizer):
        return old.backend.get_vocab(True).items() <= new.backend.get_vocab(True).items()
    if old.vocab_size > new.vocab_size:
        return False
    return all(old.decode([i]) == new.decode([i]) for i in range(old.vocab_size))


def takes_whole_words(base: SubwordTokenizer) -> bool:
    """Whether a word of the base's own cutting, with its space, can be an entry of the vocabulary that no merge makes,
    and all other text stays spelled as it is."""
    model = json.loads(base.backend.to_str())["model"]
    decoder = base.backend.decoder
    if model["type"] != "BPE" or not base._byte_level or base.backend.pre_tokenizer is None or decoder is None:
        return False
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"] or model["dropout"]:
        return False
    if [word for word, _ in _cut(base, "ab cd")][1:] != ["Ġcd"]:
        return False
    # an entry that its merges do not lead to (a special token) must not begin to be matched in text
    unreached = [s for s in base.backend.get_vocab(True) if len(base.backend.model.tokenize(s)) != 1]
    return not any(s == word for s in unreached for word, _ in _cut(base, decoder.decode([s])))


def _cut(base: SubwordTokenizer, text: str) -> list[tuple[str, str]]:
    """The words of a text before they become pieces: as the vocabulary spells them, and as they read."""
    if base.backend.normalizer is not None:
        text = base.backend.normalizer.normalize_str(text)
    return [(word, text[start:end]) for word, (start, end) in base.backend.pre_tokenizer.pre_tokenize_str(text)]


def _chunks(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_CHUNK.findall(text))
    return counts


def _saved_by_words(base: SubwordTokenizer, texts: Iterable[str], min_frequency: int) -> dict[str, int]:
    """Spelling of each frequent word that has a letter -> how many tokens it saves, count * (pieces - 1)."""
    counts: Counter[str] = Counter()
    for chunk, count in _chunks(texts).items():
        for word, read in _cut(base, chunk):
            if any(character.isalpha() for character in read):
                counts[word] += count
    frequent = {word: count for word, count in counts.items() if count >= min_frequency}
    saved = {word: count * (len(base.backend.model.tokenize(word)) - 1) for word, count in frequent.items()}
    return {word: tokens for word, tokens in saved.items() if tokens > 0}


def _saved(base: SubwordTokenizer, texts: Iterable[str], min_frequency: int) -> dict[str, int]:
    """Each frequent word that can be an added token -> how many tokens it saves.

    A piece that also holds what touches the word, such as the space before it, leaves a piece behind.
    """
    from tokenizers import Regex, pre_tokenizers

    chunks = list(_chunks(texts).items())
    find = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)  # the library's own \w: marks too
    counts: Counter[str] = Counter()
    saved: Counter[str] = Counter()
    for first in range(0, len(chunks), _BATCH):
        batch = chunks[first : first + _BATCH]
        encodings = base.backend.encode_batch([chunk for chunk, _ in batch], add_special_tokens=False)
        for (chunk, count), encoding in zip(batch, encodings, strict=True):
            spans = [span for span in encoding.offsets if span[0] < span[1]]
            for found, (start, end) in find.pre_tokenize_str(chunk):
                word = _normal(base, found)
                if word is None or not any(character.isalpha() for character in word):
                    continue
                over = [(a, b) for a, b in spans if a < end and b > start]
                left_behind = any(a < start for a, _ in over) + any(b > end for _, b in over)
                counts[word] += count
                saved[word] += count * (len(over) - 1 - left_behind)
    return {word: tokens for word, tokens in saved.items() if tokens > 0 and counts[word] >= min_frequency}


def _normal(base: SubwordTokenizer, word: str) -> str | None:
    """The form of a word that an added token has; None if it can have none, or is in the vocabulary already."""
    normalizer = base.backend.normalizer
    if normalizer is not None:
        word = normalizer.normalize_str(word).strip()
        if normalizer.normalize_str(word) != word:
            return None
    if not word or re.search(r"\s", word) or base.backend.token_to_id(word) is not None:
        return None
    cutter = base.backend.pre_tokenizer
    if cutter is not None and len(cutter.pre_tokenize_str(word)) != 1:
        return None  # several words to the base, as a_b is to WordPiece
    # a byte-level decoder reads a token of nothing but its letters as bytes: "naïve" is no UTF-8 then
    return None if base._byte_level and not word.isascii() and _byte_alphabet().issuperset(word) else word


def _whole(base: SubwordTokenizer, tokens: Sequence[str]) -> list[str]:
    """Spellings of the given words, in their order, that are no tokens yet."""
    words: dict[str, None] = {}
    for token in tokens:
        for form in (token,) if token.startswith(" ") else (token, f" {token}"):
            cut = _cut(base, form)
            if len(cut) != 1:
                raise UserError(
                    f"tokenizer.tokens: {token!r} is not one word for this tokenizer, which cuts {form!r} into "
                    f"{len(cut)}; give single words, with at most one space before them."
                )
            if base.backend.token_to_id(cut[0][0]) is None:
                words[cut[0][0]] = None
    return list(words)


def _single(base: SubwordTokenizer, tokens: Sequence[str]) -> list[str]:
    """The given words, in their order, as added tokens, that are no tokens yet."""
    words: dict[str, None] = {}
    for token in tokens:
        if len(base.encode([token])[0]) == 1 and base.unk_id not in base.encode([token])[0]:
            continue
        word = _normal(base, token.strip())
        if word is None:
            raise UserError(
                f"tokenizer.tokens: {token!r} cannot be one token of this tokenizer; expected a word without white "
                "space that its normalizer leaves whole and that is no part of its vocabulary."
            )
        words[word] = None
    return list(words)


def _with_entries(base: SubwordTokenizer, words: Sequence[str]) -> SubwordTokenizer:
    """The base with these spellings as entries of its vocabulary."""
    import tokenizers

    state = json.loads(base.backend.to_str())
    model = state["model"]
    # special tokens too, so that there is no gap: the library counts entries to find the next free id
    model["vocab"] = {**base.backend.get_vocab(True), **{w: base.vocab_size + n for n, w in enumerate(words)}}
    model["ignore_merges"] = True
    return _checked(base, tokenizers.Tokenizer.from_str(json.dumps(state)), words)


def _with_added_tokens(base: SubwordTokenizer, words: Sequence[str]) -> SubwordTokenizer:
    """The base with these words as added tokens of the library."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(json.dumps(base._backend_state))
    normalized = backend.normalizer is not None  # then they are looked for in normalized text
    backend.add_tokens(
        [tokenizers.AddedToken(w, special=False, single_word=True, normalized=normalized) for w in words]
    )
    longer = _checked(base, backend, words)
    longer._backend_state["model"] = base._backend_state["model"]  # floats may be read one bit off
    probes = [f"a {w}, ({w}) {w} {w}s {w}\n{w}" for w in words]
    for probe, a, b in zip(probes, base.encode(probes), longer.encode(probes), strict=True):
        known = base.unk_id is None or base.unk_id not in a
        if known and base.decode(a) != longer.decode(b):
            raise UserError(
                f"With a word of {probe!r} as a token, this tokenizer writes the text back as {longer.decode(b)!r}, "
                f"not as {base.decode(a)!r}: most likely it puts a sign before each part of a text, also before what "
                "follows an added word. Give a base that does not, such as a byte-level one (tokenizer=bpe)."
            )
    return longer


def _checked(base: SubwordTokenizer, backend: tokenizers.Tokenizer, words: Sequence[str]) -> SubwordTokenizer:
    """The longer tokenizer; `UserError` if the library did not give the words the ids after the last."""
    ids = [backend.token_to_id(word) for word in words]
    n = base.vocab_size
    if ids != list(range(n, n + len(words))) or len(base.backend.get_vocab(True)) != n:
        raise UserError(
            "The ids of this tokenizer have gaps, and its library would put new tokens there; expected a base whose "
            "ids are 0, 1, ... without gaps."
        )
    spelled = base._spelled
    return SubwordTokenizer(backend, str(spelled["eos"]), spelled["pad"], spelled["unk"], roles=base.roles)
