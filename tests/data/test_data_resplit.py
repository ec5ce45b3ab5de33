"""BPE-dropout: the published algorithm's distribution, the same text, a pure function of the sample, never longer than
fits, and in training only."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.contracts import Sample, UserError
from lmexp.corpus.labelled import COLUMNS
from lmexp.corpus.parallel_files import ParallelFiles
from lmexp.data.resplit import Resplit
from lmexp.data.text import TextData
from lmexp.objective.classification import Classification
from lmexp.objective.text_to_text import TextToText
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import Byte
from lmexp.tokenizer.unigram import Unigram

WORDS = ["lower", "lowest", "newer", "newest", "wider", "widest", "banana", "the", "then", "there", "mississippi"]
RANDOM = np.random.default_rng(0)
TEXTS = [" ".join(RANDOM.choice(WORDS, 12)) for _ in range(200)]
TOKENIZER = BPE(300).train(iter(TEXTS))


class Source:
    """The same text for every index."""

    def __init__(self, tokens, pair=None) -> None:
        self.tokens, self.pair = np.asarray(tokens, dtype=np.int64), pair

    def samples(self, indices):
        sizes = TOKENIZER.token_bytes
        other = self.pair if self.pair is None else np.asarray(self.pair, dtype=np.int64)
        return [
            Sample(self.tokens, sizes[self.tokens], i, pair=None if other is None else Sample(other, sizes[other], i))
            for i in indices
        ]


def resplit(source, dropout, seed=1, room=10_000):
    return Resplit(source, TOKENIZER.merges(), TOKENIZER.token_bytes, dropout, seed, lambda n: np.maximum(n - room, 0))


def published(symbols, ranks, dropout):
    """Algorithm 1 of Provilkov et al. (2020) by all its outcomes: what becomes of the symbols -> its probability."""
    possible = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
    outcomes = Counter()
    for kept in itertools.product([False, True], repeat=len(possible)):
        chance = np.prod([1 - dropout if k else dropout for k in kept])
        left = [merge for merge, k in zip(possible, kept, strict=True) if k]
        if not left:
            outcomes[symbols] += chance
            continue
        place = min(left)[1]
        merged = (*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :])
        for end, further in published(merged, ranks, dropout).items():
            outcomes[end] += chance * further
    return outcomes


@pytest.mark.parametrize("dropout", [0.1, 0.4])
@pytest.mark.parametrize("word", [" lower", " newest", " banana"])
def test_cuts_are_as_likely_as_published(word, dropout) -> None:
    (tokens,) = TOKENIZER.encode([word])
    assert len(tokens) == 1, "a word of its own"
    spelled = {i: TOKENIZER.backend.id_to_token(i) for i in range(TOKENIZER.vocab_size)}
    merges = TOKENIZER._backend_state["model"]["merges"]
    ranks = {tuple(m.split(" ") if isinstance(m, str) else m): rank for rank, m in enumerate(merges)}
    wanted = published(tuple(spelled[int(tokens[0])]), ranks, dropout)
    n = 20_000
    found = Counter(
        tuple(spelled[i] for i in s.tokens.tolist()) for s in resplit(Source(tokens), dropout).samples(range(n))
    )
    assert set(found) <= set(wanted)
    for cut, chance in wanted.items():
        assert abs(found[cut] / n - chance) < 5 * np.sqrt(chance * (1 - chance) / n) + 2 / n, cut


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text())).map(" ".join), st.floats(0.01, 0.99))
def test_the_text_stays(text, dropout) -> None:
    (tokens,) = TOKENIZER.encode([text])
    for sample in resplit(Source(tokens, tokens), dropout).samples(range(3)):
        for one in (sample, sample.pair):
            assert TOKENIZER.decode(one.tokens) == text
            assert one.n_bytes.sum() == len(text.encode())
            np.testing.assert_array_equal(one.n_bytes, TOKENIZER.token_bytes[one.tokens])


def test_a_function_of_seed_and_index() -> None:
    (tokens,) = TOKENIZER.encode([TEXTS[0]])
    source = resplit(Source(tokens), 0.3)
    all_at_once = [s.tokens.tolist() for s in source.samples(range(20))]
    assert [s.tokens.tolist() for i in reversed(range(20)) for s in source.samples([i])] == all_at_once[::-1]
    assert len(set(map(tuple, all_at_once))) > 15
    assert [s.tokens.tolist() for s in resplit(Source(tokens), 0.3, seed=2).samples(range(20))] != all_at_once


def test_what_would_not_fit_stays() -> None:
    (tokens,) = TOKENIZER.encode([TEXTS[0]])
    lengths = {len(s.tokens) for s in resplit(Source(tokens), 0.3).samples(range(50))}
    room = (len(tokens) + max(lengths)) // 2
    assert max(lengths) > room
    fitted = [len(s.tokens) for s in resplit(Source(tokens), 0.3, room=room).samples(range(50))]
    assert max(fitted) <= room
    assert len(set(fitted)) > 1
    # one that is too long as it is: no more of it is lost
    assert {len(s.tokens) for s in resplit(Source(tokens), 0.3, room=3).samples(range(50))} == {len(tokens)}


@pytest.fixture
def corpus(tmp_path):
    for name, texts in (("en", TEXTS), ("de", [t.upper() for t in TEXTS])):
        (tmp_path / f"train.{name}").write_text("\n".join(texts), encoding="utf-8")
    source = {name: str(tmp_path / f"train.{name}") for name in ("en", "de")}
    return ParallelFiles(train=source, validation=source, cache_dir=str(tmp_path / "cache"))


class Labelled:
    """Texts of two classes, or pairs of texts."""

    streaming, multilabel, labels, splits = False, False, ("a", "b"), ("train", "validation")

    def __init__(self, n_texts, texts=TEXTS) -> None:
        self.n_texts, self.texts = n_texts, texts

    def fingerprint(self):
        return f"labelled {self.n_texts}"

    def rows(self, split):
        n = len(self.texts)
        texts = dict(zip(COLUMNS[: self.n_texts], (self.texts, self.texts[::-1])[: self.n_texts], strict=True))
        return Dataset.from_dict({**texts, "label": [i % 2 for i in range(n)], "group": [0] * n})


def make(folder, corpus, objective, dropout=0.2, rank=0, world_size=1, workers=0, tokenizer=None, family=None):
    data = TextData(corpus, str(folder / "cache"), 64, False, None, 4, workers, 2, 50, bpe_dropout=dropout)
    data.configure(tokenizer or BPE(400), objective, 8, 1, family=family or "encoder_decoder")
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=None)
    data.prepare()
    return data


def read(data, count):
    return [b["inputs"]["tokens"].tolist() for b in itertools.islice(data.train_dataloader(), count)]


def test_pairs_are_cut_in_training_only(tmp_path, corpus) -> None:
    with_it, without = (make(tmp_path, corpus, TextToText(), dropout) for dropout in (0.2, 0.0))
    tokenizer = with_it.tokenizer
    for cut, plain in zip(*(d._train_source().samples(range(40)) for d in (with_it, without)), strict=True):
        assert (cut.index, cut.part) == (plain.index, plain.part)
        assert cut.pair.language == plain.pair.language
        for a, b in ((cut, plain), (cut.pair, plain.pair)):
            assert tokenizer.decode(a.tokens) == tokenizer.decode(b.tokens)
    assert read(with_it, 3) != read(without, 3)
    for a, b in zip(with_it.val_dataloader(), without.val_dataloader(), strict=True):
        assert a["inputs"]["tokens"].tolist() == b["inputs"]["tokens"].tolist()


def test_the_same_on_two_ranks_after_a_restart_and_by_workers(tmp_path, corpus) -> None:
    whole = make(tmp_path, corpus, TextToText())
    halves = [make(tmp_path, corpus, TextToText(), rank=rank, world_size=2) for rank in (0, 1)]
    wanted = [s.tokens.tolist() for s in whole._train_source().samples(range(8, 16))]
    found = [h._train_source().samples(next(itertools.islice(h._train_indices(*h._rank()), 1, None))) for h in halves]
    assert [s.tokens.tolist() for half in found for s in half] == wanted
    batches = read(whole, 4)
    again = make(tmp_path, corpus, TextToText(), workers=2)
    again.load_state_dict({"samples": 16})
    assert read(again, 2) == batches[2:]


@pytest.mark.parametrize("n_texts", [1, 2])
def test_labelled_texts(tmp_path, n_texts) -> None:
    corpus = Labelled(n_texts)
    with_it, without = (make(tmp_path, corpus, Classification(), dropout, family="encoder") for dropout in (0.05, 0.0))
    tokenizer = with_it.tokenizer
    pairs = list(zip(*(d._train_source().samples(range(40)) for d in (with_it, without)), strict=True))
    assert all(a.label == b.label for a, b in pairs)
    if n_texts == 2:
        pairs += [(a.pair, b.pair) for a, b in pairs]
    assert all(tokenizer.decode(a.tokens) == tokenizer.decode(b.tokens) for a, b in pairs)
    assert any(len(a.tokens) > len(b.tokens) for a, b in pairs)
    with_it.max_samples = 5
    first, again = (with_it._train_source().samples(range(at, at + 5)) for at in (0, 5))
    assert [s.tokens.tolist() for s in again] == [s.tokens.tolist() for s in first]


def test_two_texts_that_do_not_fit_together_stay() -> None:
    (tokens,) = TOKENIZER.encode([TEXTS[0]])
    source = resplit(Source(tokens, tokens), 0.1)
    totals = [len(s.tokens) + len(s.pair.tokens) for s in source.samples(range(50))]
    room = int(np.median(totals))
    source.lost = lambda n: np.maximum(n.sum(1, keepdims=True) - room, 0)  # of both together
    fitted = [len(s.tokens) + len(s.pair.tokens) for s in source.samples(range(50))]
    assert fitted == [total if total <= room else 2 * len(tokens) for total in totals]


def test_parts_with_the_same_source_cut_it_differently(tmp_path) -> None:
    for name in ("en", "de", "fr"):
        (tmp_path / f"train.{name}").write_text("\n".join(TEXTS), encoding="utf-8")
    source = {name: str(tmp_path / f"train.{name}") for name in ("en", "de", "fr")}
    corpus = ParallelFiles(train=source, validation=source, cache_dir=str(tmp_path / "cache"))
    data = make(tmp_path, corpus, TextToText())
    cuts = {}
    for sample in data._train_source().samples(range(400)):
        cuts.setdefault((sample.part, data.tokenizer.decode(sample.tokens)), sample.tokens.tolist())
    both = [(cuts[0, text], cuts[1, text]) for part, text in cuts if part == 0 and (1, text) in cuts]
    assert len(both) > 20
    assert sum(a != b for a, b in both) > len(both) / 2


def test_a_vocabulary_without_merges_is_an_error(tmp_path, corpus) -> None:
    for tokenizer in (Unigram(100), Byte()):
        with pytest.raises(UserError, match=r"data\.bpe_dropout=0\.2 needs a tokenizer of merges"):
            make(tmp_path, corpus, TextToText(), tokenizer=tokenizer)


def test_every_way_to_a_token_may_be_listed() -> None:
    """As vocabularies made for `tiktoken` do: each merge at its result's rank, whatever its halves' ranks are."""
    a, b, c, d, ab, cd, bcd, abcd, bc = range(9)
    merges = np.array([(a, bcd, abcd), (ab, cd, abcd), (a, b, ab), (b, cd, bcd), (c, d, cd), (b, c, bc)])
    source = SimpleNamespace(samples=lambda indices: [Sample(np.array([abcd]), np.array([4.0]), i) for i in indices])
    cut = Resplit(source, merges, np.array([1, 1, 1, 1, 2, 2, 3, 4, 2]), 0.5, 1, np.zeros_like)
    whole = sum(s.tokens.tolist() == [abcd] for s in cut.samples(range(20_000)))
    ranks = {(first, second): (rank, result) for rank, (first, second, result) in enumerate(merges.tolist())}
    assert abs(whole / 20_000 - _whole((a, b, c, d), ranks, 0.5)) < 0.02


def _whole(symbols, ranks, dropout):
    """The probability that all symbols become one."""
    if len(symbols) == 1:
        return 1.0
    possible = [(*ranks[pair], place) for place, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
    chance = 0.0
    for left_out, (_, result, place) in enumerate(sorted(possible)):  # the first of those that are not left out
        merged = (*symbols[:place], result, *symbols[place + 2 :])
        chance += dropout**left_out * (1 - dropout) * _whole(merged, ranks, dropout)
    return chance
