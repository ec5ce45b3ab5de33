"""Beam search and its constraints against Transformers' `generate` on the same weights, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmexp.contracts import UserError
from lmexp.decoding.beam import Beam, _top, beam_search
from lmexp.decoding.generate import Sampling, generate
from lmexp.decoding.steps import Constraints, completions
from lmexp.huggingface.bart import Bart
from lmexp.huggingface.gpt2 import GPT2
from lmexp.huggingface.t5 import T5
from lmexp.model.gpt import GPTConfig
from lmexp.model.t5 import T5Config
from lmexp.model.transformer import TransformerConfig

hf = pytest.importorskip("transformers")
KINDS = {"gpt2": GPT2(), "bart": Bart(), "t5": T5()}
CONFIGS = {"gpt2": GPTConfig, "bart": TransformerConfig, "t5": T5Config}
VOCAB, EOS, START = 40, 2, 3
N = 200


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    """Our models and theirs with the same weights: a decoder and two encoder-decoders."""
    from lmexp.huggingface.architecture import to_ours

    torch.manual_seed(0)
    theirs = {
        "gpt2": hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2
            )
        ),
        "bart": hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=VOCAB,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=EOS,
                decoder_start_token_id=START,
                forced_eos_token_id=None,
            )
        ),
        "t5": hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=START
            )
        ),
    }
    made = {}
    for name, their in theirs.items():
        for p in their.parameters():
            if p.dim() > 1:  # norms and biases stay: where they rule, all texts are one
                torch.nn.init.normal_(p, std=0.5)
        their.eval()
        kind = KINDS[name]
        settings = {k: v for k, v in kind.settings(their.config.to_dict()).items() if k != "_target_"}
        model = CONFIGS[name](**settings).build(VOCAB)
        model.load_state_dict(to_ours(kind, model, their.state_dict(), VOCAB).weights, strict=False)
        made[name] = (model.eval(), their)
    return made


def prompts_of(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, size=rng.integers(1, 12)).tolist() for _ in range(N)]


def their_texts(their: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """In the order of the prompts, several of each if so many are returned. They go in by length: to Transformers the
    padding of a decoder's prompt is text, whose n-grams count."""
    their.generation_config.update(eos_token_id=EOS, pad_token_id=1, forced_eos_token_id=None)
    texts: dict[int, list[list[int]]] = {}
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        out = their.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14, **options
        )
        new = out[:, 1 if their.config.is_encoder_decoder else length :].tolist()
        each = len(new) // len(rows)
        for place, i in enumerate(rows):
            found = new[place * each : (place + 1) * each]
            texts[i] = [text[: text.index(EOS) + 1] if EOS in text else text for text in found]
    return [text for i in range(len(prompts)) for text in texts[i]]


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
@pytest.mark.parametrize(
    ("ours", "options"),
    [
        ({}, {}),
        ({"length_penalty": 0.0}, {"length_penalty": 0.0}),
        ({"length_penalty": 2.0, "early_stopping": True}, {"length_penalty": 2.0, "early_stopping": True}),
        ({"length_penalty": 1.4, "early_stopping": "never"}, {"length_penalty": 1.4, "early_stopping": "never"}),
        ({"length_penalty": -0.5, "beams": 3}, {"length_penalty": -0.5, "num_beams": 3}),
        ({"no_repeat_ngram": 2, "min_new_tokens": 4}, {"no_repeat_ngram_size": 2, "min_new_tokens": 4}),
        ({"beams": 7, "no_repeat_ngram": 1}, {"num_beams": 7, "no_repeat_ngram_size": 1}),
    ],
)
def test_beam_search_is_transformers(pairs: Any, name: str, ours: dict[str, Any], options: dict[str, Any]) -> None:
    model, their = pairs[name]
    prompts = prompts_of(len(options))
    beam = Beam(**({"beams": 4, "max_new_tokens": 14} | ours))
    found = generate(model, prompts, beam, EOS, VOCAB)
    expected = their_texts(their, prompts, **({"num_beams": 4} | options))
    differing = [i for i in range(N) if found[i] != expected[i]]
    assert not differing, [(prompts[i], found[i], expected[i]) for i in differing[:3]]
    assert len({tuple(text) for text in expected}) > N // 10, "a test of many texts"


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
@pytest.mark.parametrize(("ngram", "least"), [(None, 0), (2, 0), (3, 5)])
def test_greedy_is_transformers(pairs: Any, name: str, ngram: int | None, least: int) -> None:
    model, their = pairs[name]
    prompts = prompts_of(11)
    settings = Sampling(temperature=0, max_new_tokens=14, min_new_tokens=least, no_repeat_ngram=ngram)
    options = {"no_repeat_ngram_size": ngram or 0, "min_new_tokens": least}
    assert generate(model, prompts, settings, EOS, VOCAB) == their_texts(their, prompts, num_beams=1, **options)


def test_several_texts_come_best_first(pairs: Any) -> None:
    model, their = pairs["t5"]
    prompts = prompts_of(5)[:20]
    found = beam_search(model, prompts, Beam(beams=3, max_new_tokens=14), EOS, VOCAB)
    expected = their_texts(their, prompts, num_beams=3, num_return_sequences=3)
    assert [text for row in found for _, text in row] == expected
    assert all(row == sorted(row, key=lambda pair: -pair[0]) for row in found)


def test_a_beam_that_keeps_everything_finds_the_best(pairs: Any) -> None:
    """Over three tokens, as many beams as there are texts: against all texts, one by one."""
    model, _ = pairs["gpt2"]
    prompt = [5, 9]
    beam = Beam(beams=VOCAB**2, max_new_tokens=2, length_penalty=0.0, early_stopping="never")
    score, text = beam_search(model, [prompt], beam, EOS, VOCAB)[0][0]
    with torch.no_grad():
        first = model.head(model(torch.tensor([prompt])))[0, -1].log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(VOCAB)])
        second = model.head(model(rows))[:, -1].log_softmax(-1)
    whole = first[:, None] + second
    whole[EOS] = -torch.inf
    best = max(float(whole.max()), float(first[EOS]))
    assert score == pytest.approx(best, abs=1e-4)
    assert text == [EOS] or whole[text[0], text[1]].item() == pytest.approx(best, abs=1e-4)


def test_min_p_keeps_what_is_likely_enough() -> None:
    from lmexp.decoding.generate import distribution

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    probabilities, _ = distribution(logits, Sampling(min_p=0.3))
    torch.testing.assert_close(probabilities, torch.tensor([[0.5, 0.3, 0.15, 0.0]]) / 0.95)


@pytest.mark.parametrize("width", [640, 700, 5000])
@pytest.mark.parametrize("kept", [1.0, 0.002], ids=["all", "few"])
def test_the_largest_of_a_row_are_those_of_topk(width: int, kept: float) -> None:
    x = torch.randn(7, width).round(decimals=2)  # with equals
    x[torch.rand_like(x) > kept] = -torch.inf
    values, places = _top(x, 2)
    assert values == x.topk(2).values.tolist()
    assert values == x.gather(1, torch.tensor(places)).tolist()
    assert all(len(set(row)) == 2 for row in places)


def test_completions_of_repeated_pieces() -> None:
    assert completions([1, 2, 3, 1, 2], 3) == [3]
    assert completions([1, 2, 1, 3, 1], 2) == [2, 3]
    assert completions([4, 5, 4], 1) == [4, 5]
    assert completions([1], 2) == []


def test_where_everything_is_forbidden_nothing_is() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    kept = Constraints(0, 1)(scores, [[0, 1, 2], [0]], 1, None)
    assert kept[0].tolist() == scores[0].tolist()
    assert kept[1, 0] == -torch.inf


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beams": 2.5}, "decoding.beams=2.5; expected a whole number"),
        ({"early_stopping": 1}, "early_stopping=1; expected true, false or never"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5; expected a whole number"),
        ({"beams": 0}, "decoding.beams=0; expected a whole number of at least 1"),
        ({"early_stopping": "soon"}, "early_stopping=soon; expected true, false or never"),
        ({"min_new_tokens": 300}, "min_new_tokens=300; expected at least 0 and at most"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram=0; expected at least 1"),
    ],
)
def test_what_is_no_beam_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Beam(**options)
