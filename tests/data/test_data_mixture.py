"""Mixtures: the shares of the formula, the same samples on any number of processes and after any restart."""

from __future__ import annotations

import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from lmexp.contracts import UserError
from lmexp.corpus.parts import Part, smoothed
from lmexp.data.mixture import Mixed, MixtureOrder, Pairs, Side, TextOrder
from lmexp.data.text import TextData
from lmexp.objective.masked_lm import MaskedLM
from lmexp.objective.translation_lm import TranslationLM
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte

SIZES = [1_000_000, 300_000, 40_000, 2_500, 90]


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 1.0])
def test_drawn_shares_are_the_formulas(alpha) -> None:
    powers = np.array(SIZES, dtype=float) ** alpha
    shares = smoothed(SIZES, alpha)
    np.testing.assert_allclose(shares, powers / powers.sum())
    order = MixtureOrder(tuple(shares), seed=3)
    sources, within = order.draws(0, 100_000)
    counts = np.bincount(sources, minlength=len(SIZES))
    # within 1 % of the formula, or the one sample that whole numbers cost where 1 % is less than that
    assert (np.abs(counts - 100_000 * np.array(shares)) <= np.maximum(1000 * np.array(shares), 1 + 1e-6)).all()
    whole = 100_000 // order.period * order.period
    for source in range(len(SIZES)):
        own = within[:whole][sources[:whole] == source]
        assert sorted(own) == list(range(len(own))), "each source is read from its start without gaps"
    np.testing.assert_array_equal(order.counts(100_000), counts)
    np.testing.assert_array_equal(order.counts(12_345), np.bincount(sources[:12_345], minlength=len(SIZES)))


def test_any_piece_of_the_order_is_the_same() -> None:
    order = MixtureOrder((0.5, 0.3, 0.2), seed=7)
    sources, within = order.draws(0, 5000)
    for first, count in ((0, 1), (1023, 2), (2000, 1500), (4999, 1)):
        a, b = order.draws(first, count)
        np.testing.assert_array_equal(a, sources[first : first + count])
        np.testing.assert_array_equal(b, within[first : first + count])
    assert not np.array_equal(MixtureOrder((0.5, 0.3, 0.2), seed=8).draws(0, 5000)[0], sources)


class Texts:
    streaming = False
    splits = ("train", "validation")

    def __init__(self, texts) -> None:
        self.texts = texts

    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def rows(self, split):
        return Dataset.from_dict({"text": self.texts if split == "train" else self.texts[:11]})


ENGLISH = [f"the house number {i} has {i * 7 % 90} windows" for i in range(400)]
GERMAN = [f"das Haus Nummer {i} hat {i * 7 % 90} Fenster" for i in range(400)]


class Languages:
    """English, a little German, and pairs of both."""

    streaming = False
    splits = ("train", "validation")
    languages = ("en", "de")
    alpha = 0.5

    def __init__(self, pairs=True) -> None:
        self.pairs = pairs

    def fingerprint(self):
        return f"languages {self.pairs}"

    def parts(self):
        parts = [Part("en", ("en",), (Texts(ENGLISH),)), Part("de", ("de",), (Texts(GERMAN[:60]),))]
        if self.pairs:
            parts.append(Part("en-de", ("en", "de"), (Texts(ENGLISH[:200]), Texts(GERMAN[:200]))))
        return parts


def make(folder, corpus, objective, tokenizer=None, rank=0, world_size=1, **options):
    settings = {
        "block_size": 64,
        "document_mask": False,
        "validation_blocks": None,
        "eval_batch_size": 4,
        "num_workers": 0,
        "prefetch": 2,
        "tokenizer_documents": 50,
        **options,
    }
    data = TextData(corpus, str(folder), **settings)
    data.configure(tokenizer or Byte(), objective, 8, 1, family="encoder")
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=None)
    data.prepare()
    return data


def read(batches, count):
    """(tokens of each text, labels) of every text in the batches, in the order of the rows."""
    found = []
    for batch in itertools.islice(batches, count):
        tokens, documents = batch["inputs"]["tokens"], batch["inputs"].get("documents")
        for row in range(len(tokens)):
            numbers = np.zeros(len(tokens[row])) if documents is None else documents[row].numpy()
            for number in range(int(numbers.max()) + 1):
                found.append(tuple(tokens[row].numpy()[numbers == number].tolist()))
    return found


@pytest.mark.parametrize("pairs", [True, False])
def test_the_same_on_two_ranks_and_after_a_restart(tmp_path, pairs) -> None:
    objective = TranslationLM() if pairs else MaskedLM()
    whole = make(tmp_path, Languages(pairs), objective)
    everything = read(whole.train_dataloader(), 6)
    ranks = [make(tmp_path, Languages(pairs), objective, rank=rank, world_size=2) for rank in range(2)]
    parts = [read(rank.train_dataloader(), 6) for rank in ranks]
    assert sorted(everything) == sorted(parts[0] + parts[1])
    resumed = make(tmp_path, Languages(pairs), objective)
    resumed.advance(2 * 8)
    two = len(read(whole.train_dataloader(), 2))
    assert read(resumed.train_dataloader(), 4) == everything[two:]
    assert sum(resumed.drawn().values()) == 16


def test_workers_make_the_same(tmp_path) -> None:
    a = make(tmp_path, Languages(), TranslationLM())
    b = make(tmp_path, Languages(), TranslationLM(), num_workers=2)
    assert read(a.train_dataloader(), 4) == read(b.train_dataloader(), 4)


def test_shares_of_a_corpus_are_those_of_its_tokens(tmp_path) -> None:
    data = make(tmp_path, Languages(), TranslationLM())
    tokens = {name: r.tokens for name, r in data.report.splits.items() if name.startswith("train")}
    sizes = [tokens["train en"], tokens["train de"], tokens["train en-de (en)"] + tokens["train en-de (de)"]]
    np.testing.assert_allclose(data.shares, np.sqrt(sizes) / np.sqrt(sizes).sum())
    data.advance(100_000)
    np.testing.assert_allclose(list(data.drawn().values()), 100_000 * np.array(data.shares), rtol=0.01)
    assert "drawn" in data.report.header
    assert "tokens/word" in data.report.markdown()


def test_evaluation_reads_each_part_once_with_its_tag(tmp_path) -> None:
    data = make(tmp_path, Languages(), TranslationLM())
    seen = {0: 0, 1: 0, 2: 0}
    for batch in data.val_dataloader():
        scored = batch["labels"] != -100
        for part in seen:
            seen[part] += int((scored & (batch["parts"] == part)).sum())
    assert all(seen.values())
    first = [b["labels"] for b in data.val_dataloader()]
    other = make(tmp_path, Languages(), TranslationLM())
    other.seed = 99  # the run's seed decides nothing here
    for a, b in zip(first, [b["labels"] for b in other.val_dataloader()], strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


def test_one_vocabulary_learns_from_smoothed_texts(tmp_path) -> None:
    data = make(tmp_path, Languages(False), MaskedLM(), tokenizer=BPE(vocab_size=400))
    vocabulary = data.tokenizer.backend.get_vocab()
    assert "ĠFenster" in vocabulary, "German is rare, and yet learned"


def test_a_part_that_is_too_short_is_named(tmp_path) -> None:
    class Short(Languages):
        def parts(self):
            return [Part("en", ("en",), (Texts(ENGLISH),)), Part("de", ("de",), (Texts(["kurz"]),))]

    with pytest.raises(UserError, match="train split of de holds"):
        make(tmp_path, Short(False), MaskedLM())


def test_a_mixture_puts_no_piece_of_an_order_in_order_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the texts of a period in any order; each time anew would take ten times as long as all else."""
    tokens, made = np.arange(5000), []
    side = Side(SimpleNamespace(tokens=tokens), np.arange(0, 5000, 5), 0)
    sources = [Pairs((side, side), np.ones(5000, np.float32), part, seed=1) for part in range(2)]
    ordered = TextOrder._ordered

    def counted(order: TextOrder, piece: int) -> np.ndarray:
        made.append((id(order), piece))
        return ordered(order, piece)

    monkeypatch.setattr(TextOrder, "_ordered", counted)
    mixed = Mixed(sources, MixtureOrder((0.7, 0.3), 1))
    for first in range(0, 8192, 64):
        mixed.samples(range(first, first + 64))
    assert len(made) == len(set(made)) <= 8192 // 128 + 4
