"""Masked, span-corrupted, infilled, prefixed and paired texts: their definitions, over many samples."""

from __future__ import annotations

import itertools
from math import comb, exp, factorial

import numpy as np
import pytest
import torch

from lmexp.contracts import IGNORE_INDEX, Sample, UserError
from lmexp.objective.denoising import Denoising
from lmexp.objective.masked_lm import MaskedLM
from lmexp.objective.noise import composition, generator, sentence_ends, word_edges
from lmexp.objective.prefix_lm import PrefixLM
from lmexp.objective.rows import first_fit
from lmexp.objective.span_corruption import SpanCorruption
from lmexp.objective.translation_lm import TranslationLM
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import ByteTokenizer
from lmexp.tokenizer.char import Char
from lmexp.tokenizer.unigram import Unigram
from lmexp.tokenizer.wordpiece import WordPiece

BLOCK = 64
N = 10_000


def tokenizer_for(objective):
    return ByteTokenizer().with_roles(objective.special_tokens(objective.families[0]))


def text(tokenizer, index, length, eos=0.05, **more):
    """Random bytes with some document ends between."""
    rng = np.random.default_rng(index)
    tokens = np.where(rng.random(length) < eos, 0, rng.integers(1, 257, size=length))
    return Sample(tokens, tokenizer.token_bytes[tokens], index, **more)


@pytest.mark.parametrize("cls", [True, False])
def test_masked_rates_and_fates_over_many_samples(cls) -> None:
    objective = MaskedLM(cls=cls)
    tokenizer = tokenizer_for(objective)
    collate = objective.collate(tokenizer, "encoder")
    mask = tokenizer.roles["mask"]
    length = objective.sample_length(BLOCK)
    fates = {"mask": 0, "random": 0, "kept": 0}
    places = np.zeros(BLOCK)
    for index in range(N):
        sample = text(tokenizer, index, length)
        batch = collate([sample], BLOCK, seed=1)
        original = np.concatenate(([tokenizer.roles["cls"]], sample.tokens)) if cls else sample.tokens
        read = batch["inputs"]["tokens"][0].numpy()
        real = batch["labels"][0].numpy() != IGNORE_INDEX
        at = batch["scored"][0].numpy()[real]
        labels = batch["labels"][0].numpy()[real]
        able = (sample.tokens > 0).sum()
        assert real.sum() == max(1, round(0.15 * able)), "the rate is exact in each sample"
        assert batch["scored"].shape == (1, round(0.15 * length)), "shapes do not change"
        assert (original[at] == labels).all()
        assert ((labels > 0) & (labels < 257)).all(), "a special token was masked"
        assert len(set(at)) == len(at)
        untouched = np.ones(BLOCK, dtype=bool)
        untouched[at] = False
        assert (read[untouched] == original[untouched]).all()
        assert batch["n_bytes"].item() == real.sum()
        replaced = read[at]
        assert (((replaced > 0) & (replaced < 257)) | (replaced == mask)).all(), "replaced by a special token"
        fates["mask"] += (replaced == mask).sum()
        fates["kept"] += (replaced == labels).sum()
        fates["random"] += ((replaced != mask) & (replaced != labels)).sum()
        places[at] += 1
    total = sum(fates.values())
    assert abs(fates["mask"] / total - 0.8) < 0.005
    assert abs(fates["random"] / total - 0.1 * 255 / 256) < 0.004  # a random one may be the same
    assert abs(fates["kept"] / total - 0.1 * 257 / 256) < 0.004
    even = places[int(cls) :]
    assert even.max() / even.min() < 1.2, "every place is as likely"
    assert places[:1].sum() == 0 or not cls


def test_noise_is_a_function_of_seed_and_index_alone() -> None:
    for objective in (MaskedLM(), SpanCorruption(), Denoising(), PrefixLM(), TranslationLM()):
        family = objective.families[-1]
        tokenizer = tokenizer_for(objective)
        collate = objective.collate(tokenizer, family)
        samples = [text(tokenizer, i, objective.sample_length(BLOCK)) for i in range(6)]
        together = collate(samples, BLOCK, 3)
        for row in range(6):
            alone = collate(samples[row : row + 1], BLOCK, 3)
            real = alone["labels"][0] != IGNORE_INDEX
            expected = together["labels"][row][together["labels"][row] != IGNORE_INDEX]
            assert torch.equal(alone["labels"][0][real], expected), objective
            width = alone["inputs"]["tokens"].shape[1]
            assert torch.equal(alone["inputs"]["tokens"][0], together["inputs"]["tokens"][row, :width]), objective
        assert not torch.equal(collate(samples, BLOCK, 4)["inputs"]["tokens"], together["inputs"]["tokens"][:, :BLOCK])


def test_whole_words_are_masked_whole() -> None:
    texts = ["the internationalisation of miscellaneous configurations, undoubtedly necessary."] * 30
    for config in (BPE(vocab_size=290), WordPiece(vocab_size=110), Unigram(vocab_size=100)):
        objective = MaskedLM(rate=0.5, whole_word=True, cls=False, mask_share=1.0, random_share=0.0)
        tokenizer = config.train(iter(texts)).with_roles(objective.special_tokens(objective.families[0]))
        (ids,) = tokenizer.encode(texts[:1])
        begins, ends = word_edges(tokenizer)
        word = np.concatenate(([0], (~(begins[ids[1:]] & ends[ids[:-1]])).cumsum()))
        assert len(set(word)) in (8, 9), f"{config}: 6 words, a comma, a full stop"  # and perhaps a space before
        collate = objective.collate(tokenizer, "encoder")
        hidden_words = set()
        for index in range(50):
            sample = Sample(ids.astype(np.int64), tokenizer.token_bytes[ids], index)
            batch = collate([sample], 128, 0)
            hidden = batch["inputs"]["tokens"][0, : len(ids)].numpy() == tokenizer.roles["mask"]
            able = tokenizer.token_bytes[ids] > 0
            for number in set(word):
                assert len(set(hidden[(word == number) & able])) == 1, "a word was masked in part"
            assert 1 <= hidden.sum() <= round(0.5 * len(ids))
            hidden_words |= set(word[hidden])
        assert len(hidden_words) >= 6


def test_compositions_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for index in range(6000):
        drawn = tuple(composition(5, 3, generator(0, index)).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6  # (3 1 1), (1 3 1), (1 1 3), (2 2 1), (2 1 2), (1 2 2)
    assert min(counts.values()) > 850


@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3.0), (0.5, 5.0), (0.15, 1.0)])
def test_span_corruption_rebuilds_the_text_and_keeps_its_rates(rate, mean_span) -> None:
    objective = SpanCorruption(rate=rate, mean_span=mean_span)
    tokenizer = tokenizer_for(objective)
    collate = objective.collate(tokenizer, "encoder_decoder")
    sentinels = [tokenizer.roles[f"sentinel_{i}"] for i in range(100)]
    length = objective.sample_length(BLOCK)
    assert max(objective.lengths(length)) <= BLOCK < max(objective.lengths(length + 1))
    dropped, spans = 0, []
    for index in range(N):
        sample = text(tokenizer, index, length, eos=0)
        batch = collate([sample], BLOCK, seed=1)
        assert batch["inputs"].keys() == {"tokens", "decoder_tokens"}, "full blocks have no padding"
        source = batch["inputs"]["tokens"][0].tolist()
        target = batch["labels"][0].tolist()
        assert batch["inputs"]["decoder_tokens"][0].tolist() == [0, *target[:-1]]
        assert source.pop() == 0 and target.pop() == 0  # noqa: PT018
        pieces: dict[int, list[int]] = {}
        for token in target:
            if token in sentinels:
                pieces[token] = []
            else:
                pieces[list(pieces)[-1]].append(token)
        assert list(pieces) == sentinels[: len(pieces)], "sentinels in order, each once"
        rebuilt = [t for token in source for t in pieces.get(token, [token])]
        assert rebuilt == sample.tokens.tolist()
        assert batch["n_bytes"].item() == sum(map(len, pieces.values()))
        dropped += sum(map(len, pieces.values()))
        spans += [len(piece) for piece in pieces.values()]
    assert abs(dropped / (N * length) - rate) < 0.5 / length + 1e-9  # whole tokens
    assert abs(np.mean(spans) - mean_span) < 0.35
    assert min(spans) == 1


def test_span_corruption_of_short_texts_and_too_few_sentinels() -> None:
    objective = SpanCorruption()
    tokenizer = tokenizer_for(objective)
    collate = objective.collate(tokenizer, "encoder_decoder")
    batch = collate([text(tokenizer, i, n, eos=0) for i, n in enumerate((0, 1, 2, 9))], BLOCK, 0)
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist()[:2] == [0, 0]
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist()[2:] == [3, 3]
    assert (batch["inputs"]["documents"][:2] == -1).all()
    with pytest.raises(UserError, match="sentinels=3"):
        SpanCorruption(sentinels=3).sample_length(512)


def test_denoising_hides_the_share_in_poisson_spans() -> None:
    objective = Denoising(permute=False)
    tokenizer = tokenizer_for(objective)
    collate = objective.collate(tokenizer, "encoder_decoder")
    mask = tokenizer.roles["mask"]
    length = objective.sample_length(BLOCK)
    lengths: list[int] = []
    for index in range(N):
        sample = text(tokenizer, index, length, eos=0)
        drawn = objective.span_lengths(length, generator(1, index))
        assert drawn.sum() == round(0.3 * length)
        lengths += drawn[:-1].tolist()  # the last is cut
        source = collate.noised(sample, 1).tolist()
        assert source.pop() == 0
        assert source.count(mask) == len(drawn)
        assert not any(a == b == mask for a, b in itertools.pairwise(source)), "two spans touch"
        kept = [t for t in source if t != mask]
        assert len(kept) == length - drawn.sum()
        # what stands at the masks, filled in from the text, rebuilds it
        rebuilt, at = [], 0
        hidden = iter(drawn.tolist())
        for token in source:
            n = next(hidden) if token == mask else 1
            rebuilt += sample.tokens[at : at + n].tolist()
            assert token == mask or token == sample.tokens[at]
            at += n
        assert rebuilt == sample.tokens.tolist()
    mean, zero = np.mean(lengths), np.mean(np.array(lengths) == 0)
    # spans before the budget runs out are a little shorter than Poisson(3)
    assert 2.6 < mean <= 3.0
    assert abs(zero - np.exp(-3)) < 0.015


def test_denoising_writes_the_text_and_permutes_sentences() -> None:
    objective = Denoising(rate=0.0)
    tokenizer = tokenizer_for(objective)
    assert np.flatnonzero(sentence_ends(tokenizer)).tolist() == [ord(c) + 1 for c in "\n!.?"]
    collate = objective.collate(tokenizer, "encoder_decoder")
    orders = set()
    for index in range(50):
        (ids,) = tokenizer.encode(["One two. Three! Four? And a rest"])
        batch = collate([Sample(ids.astype(np.int64), tokenizer.token_bytes[ids], index)], BLOCK, 0)
        labels = batch["labels"][0]
        assert tokenizer.decode(labels[labels != IGNORE_INDEX].tolist(), skip_special=True).startswith("One two.")
        read = tokenizer.decode(batch["inputs"]["tokens"][0].tolist(), skip_special=True)
        assert sorted(read) == sorted("One two. Three! Four? And a rest")
        orders.add(read)
    assert len(orders) > 15


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_prefixes_are_read_and_the_rest_is_scored(family) -> None:
    objective = PrefixLM()
    tokenizer = ByteTokenizer()
    collate = objective.collate(tokenizer, family)
    splits = np.zeros(BLOCK + 1)
    for index in range(3000):
        sample = text(tokenizer, index, BLOCK + 1, eos=0)
        batch = collate([sample], BLOCK, 2)
        scored = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
        n = BLOCK + 1 - len(scored)
        assert scored == sample.tokens[n:].tolist()
        assert batch["n_bytes"].item() == len(scored)
        splits[n] += 1
        if family == "decoder":
            assert batch["inputs"]["prefix"].item() == n
            assert batch["inputs"]["tokens"][0].tolist() == sample.tokens[:-1].tolist()
        else:
            documents = batch["inputs"].get("documents", torch.zeros(1, BLOCK, dtype=torch.int64))
            assert batch["inputs"]["tokens"][0][documents[0] == 0].tolist() == sample.tokens[:n].tolist()
    assert splits[0] == splits[-1] == 0 or splits[BLOCK] > 0
    assert splits[1:-1].min() > 0
    empty = collate([text(tokenizer, 0, 0), text(tokenizer, 1, 1, eos=0)], BLOCK, 0)
    assert (empty["labels"] == IGNORE_INDEX).all()


def test_pairs_stand_side_by_side_with_their_own_positions_and_languages() -> None:
    objective = TranslationLM()
    tokenizer = tokenizer_for(objective)
    cls, sep, mask = (tokenizer.roles[role] for role in ("cls", "sep", "mask"))
    collate = objective.collate(tokenizer, "encoder")
    samples = []
    for index, (a, b) in enumerate([(10, 12), (5, 4), (20, 18), (70, 30), (0, 0)]):
        pair = text(tokenizer, 100 + index, b, eos=0, part=2, language=1)
        samples.append(text(tokenizer, index, a, eos=0, part=2, language=3, pair=pair if a else None))
    block = text(tokenizer, 9, objective.sample_length(BLOCK), part=0, language=1)
    batch = collate([*samples, block], BLOCK, 5)
    tokens, documents, positions, languages = (
        batch["inputs"][name].numpy() for name in ("tokens", "documents", "positions", "languages")
    )
    found = 0
    for row in range(len(tokens)):
        restored = tokens[row].copy()
        real = batch["labels"][row].numpy() != IGNORE_INDEX
        restored[batch["scored"][row].numpy()[real]] = batch["labels"][row].numpy()[real]
        for number in range(documents[row].max() + 1):
            here = documents[row] == number
            ids, where, language = restored[here], positions[row][here], languages[row][here]
            assert ids[0] == cls
            assert mask not in ids
            if sep not in ids:
                assert ids[1:].tolist() == block.tokens.tolist()
                assert set(language) == {1}
                continue
            first, second = np.flatnonzero(ids == sep)
            sample = next(s for s in samples if len(s.tokens) and s.tokens[0] == ids[1])
            a, b = first - 1, second - first - 1
            assert ids[1:first].tolist() == sample.tokens[:a].tolist()
            assert ids[first + 1 : second].tolist() == sample.pair.tokens[:b].tolist()
            assert where.tolist() == [*range(a + 2), *range(b + 1)]
            assert language.tolist() == [3] * (a + 2) + [1] * (b + 1)
            if len(sample.tokens) + len(sample.pair.tokens) <= BLOCK - 3:
                assert (a, b) == (len(sample.tokens), len(sample.pair.tokens))
            else:
                assert a + b == BLOCK - 3
                assert abs(a / b - 70 / 30) < 0.1
            found += 1
    assert found == 4
    assert len(tokens) < 5, "pairs share rows"
    padding = documents == -1
    assert (tokens[padding] == 0).all()


def test_first_fit_keeps_order_and_wastes_little() -> None:
    assert first_fit([5, 4, 3, 0, 2, 6], 8) == [[0, 2], [1, 4], [5]]
    assert first_fit([], 8) == []
    assert first_fit([(5, 1), (3, 8), (3, 7), (0, 0)], 8) == [[0, 2], [1]], "both lengths must fit"
    assert first_fit([(5, 1), (3, 3), (3, 2), (8, 4)], 8, 4) == [[0, 1], [2], [3]], "targets have less room"
    lengths = np.random.default_rng(0).integers(10, 60, size=400).tolist()
    rows = first_fit(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(400))
    assert all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert sum(lengths) / (128 * len(rows)) > 0.95


def test_nothing_gives_a_batch_in_which_nothing_is_scored() -> None:
    for objective in (MaskedLM(), TranslationLM(), SpanCorruption(), Denoising()):
        tokenizer = tokenizer_for(objective)
        batch = objective.collate(tokenizer, objective.families[0])([text(tokenizer, 0, 0)], BLOCK, 0)
        assert batch["inputs"]["tokens"].shape[0] == 1
        assert (batch["labels"] == IGNORE_INDEX).all()
        assert (batch["inputs"]["documents"] == -1).all()


def test_documents_of_a_block_are_kept_apart() -> None:
    objective = MaskedLM()
    tokenizer = tokenizer_for(objective)
    documents = np.repeat([0, 1, 2], [20, 30, 13])
    batch = objective.collate(tokenizer, "encoder")([text(tokenizer, 0, 63, documents=documents)], BLOCK, 0)
    assert batch["inputs"]["documents"][0].tolist() == [0, *documents.tolist()]
    assert batch["inputs"]["positions"][0].tolist() == [*range(21), *range(30), *range(13)]


def test_mistakes() -> None:
    for make in (
        lambda: MaskedLM(rate=0),
        lambda: MaskedLM(mask_share=0.9, random_share=0.2),
        lambda: Denoising(rate=1),
    ):
        with pytest.raises(UserError, match="expected"):
            make()


def test_an_empty_translation_and_spans_without_a_gap() -> None:
    pairs = TranslationLM()
    tokenizer = tokenizer_for(pairs)
    long = text(tokenizer, 0, 90, eos=0, pair=text(tokenizer, 1, 0))
    batch = pairs.collate(tokenizer, "encoder")([long], BLOCK, 0)
    assert (batch["inputs"]["documents"][0] == 0).sum() <= BLOCK
    with pytest.raises(UserError, match="cls=false"):
        TranslationLM(cls=False)
    dense = Denoising(rate=0.9, mean_span=1.0, permute=False)
    tokenizer = tokenizer_for(dense)
    collate = dense.collate(tokenizer, "encoder_decoder")
    for index in range(200):
        source = collate.noised(text(tokenizer, index, 63, eos=0), 0)
        assert (source != tokenizer.roles["mask"]).sum() - 1 == 63 - round(0.9 * 63)


def test_documents_keep_their_ends_and_sentences_when_denoised() -> None:
    objective = Denoising()
    tokenizer = tokenizer_for(objective)
    collate = objective.collate(tokenizer, "encoder_decoder")
    mask = tokenizer.roles["mask"]
    for index in range(300):
        sample = text(tokenizer, index, 63)
        noised = collate.noised(sample, 0)[:-1]
        documents = np.split(sample.tokens, np.flatnonzero(sample.tokens == 0))
        read = np.split(noised, np.flatnonzero(noised == 0))
        assert len(read) == len(documents)
        for there, here in zip(documents, read, strict=True):
            assert not np.setdiff1d(here[here != mask], there).size
            assert (here != mask).sum() == len(there) - round(0.3 * (there > 0).sum())


def test_marks_on_letters_do_not_begin_words_and_long_words_are_cut() -> None:
    words = "\u0939\u093f\u0928\u094d\u0926\u0940 \u0926\u0947\u0936"  # two words of Devanagari, with vowel signs
    tokenizer = Char().train(iter([words]))
    (ids,) = tokenizer.encode([words])
    begins, ends = word_edges(tokenizer)
    assert np.flatnonzero(~(begins[ids[1:]] & ends[ids[:-1]])).tolist() == [words.index(" ") - 1]
    plain = ByteTokenizer().with_roles(("mask",))
    long = np.full(63, 98)  # one word, longer than the share
    collate = MaskedLM(whole_word=True, cls=False).collate(plain, "encoder")
    batch = collate([Sample(long, plain.token_bytes[long], 0)], 63, 0)
    assert (batch["labels"] != IGNORE_INDEX).sum() == batch["labels"].shape[1] == 9


def test_inputs_have_the_same_names_in_every_batch_and_blocks_a_least_size() -> None:
    objective = TranslationLM()
    tokenizer = tokenizer_for(objective)
    assert "languages" in objective.collate(tokenizer, "encoder")([text(tokenizer, 0, 0)], BLOCK, 0)["inputs"]
    with pytest.raises(UserError, match="block_size=2"):
        SpanCorruption().sample_length(2)


def released_noise_mask(length, rng, rate=0.15, mean_span=3.0):
    """`random_spans_noise_mask` of T5's released code, a line at a time."""
    n_noise = min(max(int(np.round(length * rate)), 1), length - 1)
    n_spans = max(int(np.round(n_noise / mean_span)), 1)

    def segmentation(n_items, n_segments):
        first = (np.arange(n_items - 1) < n_segments - 1).astype(int)
        rng.shuffle(first)
        return np.bincount(np.concatenate(([0], first)).cumsum())

    lengths = np.stack((segmentation(length - n_noise, n_spans), segmentation(n_noise, n_spans)), 1).reshape(-1)
    starts = lengths.cumsum()[:-1]
    indicator = np.zeros(length, dtype=int)
    indicator[starts] = 1
    return indicator.cumsum() % 2 == 1


def test_spans_are_distributed_as_in_the_released_code() -> None:
    objective, length = SpanCorruption(), 41
    assert objective.sample_length(512) == 568, "published: 568 tokens give 512 to read"
    assert objective.lengths(568) == (512, 114)
    rng = np.random.default_rng(0)
    ours = np.stack([objective.spans(length, generator(0, i)) for i in range(N)])
    theirs = np.stack([released_noise_mask(length, rng) for _ in range(N)])
    assert (ours.sum(1) == 6).all()
    assert (theirs.sum(1) == 6).all()
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.03, "where"
    tokens, spans = objective.dropped(120)
    assert (tokens, spans) == (18, 6)
    counts = np.zeros(tokens)
    for index in range(N):
        masked = objective.spans(120, generator(1, index))
        edges = np.flatnonzero(np.diff(np.concatenate(([0], masked, [0]))))
        counts[edges[1] - edges[0]] += 1  # the first span's length
    for n in range(1, 8):  # a composition of 18 into 6 of which one is n leaves 18 - n for 5
        assert abs(counts[n] / N - comb(17 - n, 4) / comb(17, 5)) < 0.015


def test_infilled_spans_are_poisson() -> None:
    first = np.array([Denoising().span_lengths(500, generator(2, i))[0] for i in range(N)])
    for n in range(9):
        assert abs((first == n).mean() - exp(-3) * 3**n / factorial(n)) < 0.015
