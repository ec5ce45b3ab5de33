"""model=auto: Transformers' own models under our contracts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lmexp.contracts import UserError
from lmexp.decoding.generate import Sampling, generate
from lmexp.model.auto import AutoModelSettings
from lmexp.optimizer.groups import split_parameters

transformers = pytest.importorskip("transformers")
V = 33
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER_DECODER = {
    "d_model": 16,
    **{f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
}
CASES = {
    # name: kind, overrides, longest context
    "gpt2": ("causal", {"n_embd": 16, "n_layer": 2, "n_head": 2}, 1024),
    "gpt_neox": ("causal", {**SMALL, "intermediate_size": 24}, 2048),
    "opt": ("causal", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, 2048),
    "bloom": ("causal", {"hidden_size": 16, "n_layer": 2, "n_head": 2}, 2**20),  # no positions
    "openai-gpt": ("causal", {"n_embd": 16, "n_layer": 2, "n_head": 2}, 512),  # no cache
    "bert": ("masked", {**SMALL, "intermediate_size": 24}, 512),
    "roberta": ("masked", {**SMALL, "intermediate_size": 24}, 510),
    "t5": ("seq2seq", {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24}, 2**20),
    "bart": ("seq2seq", ENCODER_DECODER, 1024),
    "marian": ("seq2seq", ENCODER_DECODER, 1024),
}


def settings(name, **options):
    kind, overrides, _ = CASES[name]
    return AutoModelSettings(name=name, kind=kind, overrides=dict(overrides), **options)


def build(name):
    torch.manual_seed(1)
    model = settings(name).build(V).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def inputs_of(model, length=9):
    """Rows of 9, 5 and 1 tokens, as ours and as theirs call them."""
    torch.manual_seed(2)
    tokens = torch.randint(2, V, (3, length))
    pads = torch.arange(length) >= torch.tensor([length, 5, 1])[:, None]
    ours = {"tokens": tokens, "documents": -pads.long(), "positions": torch.arange(length).expand(3, -1)}
    theirs = {"input_ids": tokens, "attention_mask": (~pads).long()}
    if model.family == "encoder_decoder":
        ours |= {"decoder_tokens": tokens, "decoder_documents": -pads.long()}
        theirs |= {"decoder_input_ids": tokens, "decoder_attention_mask": (~pads).long()}
    return ours, theirs, pads


@pytest.mark.parametrize("name", CASES)
def test_it_is_theirs(name):
    model = build(name)
    assert model.family == settings(name).family
    assert (model.vocab_size, model.max_length, model.n_layers) == (V, CASES[name][2], 2)
    ours, theirs, pads = inputs_of(model)
    logits, expected = model(**ours), model.network(**theirs).logits
    assert logits.shape == (3, 9, V)
    assert torch.equal(model.head(logits), logits)
    assert (logits - expected)[~pads].abs().max() <= 1e-5
    labels = theirs["input_ids"].masked_fill(pads, -100).flatten()
    loss = model.head.loss(logits.flatten(0, 1), labels)
    wanted = F.cross_entropy(expected.flatten(0, 1), labels, reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        each = model.head.loss(logits.flatten(0, 1), labels, reduction="none")
    assert each.shape == labels.shape
    torch.testing.assert_close(each.sum(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert not each[labels == -100].any()
    loss.backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("name", CASES)
def test_shapes_alone(name):
    with torch.device("meta"):
        model = settings(name).build(64)
    assert all(p.is_meta for p in model.parameters())
    assert model.vocab_size == 64
    looked_up = 64 * 16 if name == "gpt_neox" else 0  # the only one here whose head is not its embedding
    multiplied = sum(p.numel() for p in model.parameters()) - looked_up
    assert model.flops_per_token(8) == 6 * multiplied + 12 * 2 * 8 * 16


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] != "masked"])
def test_generates_what_theirs_does(name):
    model = build(name)
    if model.family == "decoder":
        model.network.generation_config.eos_token_id = None
        prompts = [[5, 6, 7, 8, 9], [10], [11, 3]]
        own = {"pad_token_id": 0}
    else:
        start = model.decoder_start_id
        prompts = [[5, 6, 7, 8, 9], [10, 4], [11, 3, 2]]
        own = {"decoder_start_token_id": start, "pad_token_id": 0, "forced_eos_token_id": None}
        own |= {"bad_words_ids": None, "num_beams": 1, "eos_token_id": None}
    greedy = Sampling(temperature=0, max_new_tokens=6)
    together = generate(model, prompts, greedy, None, V)
    for prompt, row in zip(prompts, together, strict=True):
        assert generate(model, [prompt], greedy, None, V) == [row]
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        out = model.network.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=6, **own)
        skip = len(prompt) if model.family == "decoder" else 1
        assert out[0, skip:].tolist() == row


def test_rows_of_several_texts_are_refused():
    model = build("gpt2")
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UserError, match="more than one"):
        model(tokens, documents=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(UserError, match="prefix"):
        model(tokens, prefix=torch.tensor([2]))
    with pytest.raises(UserError, match="language"):
        model(tokens, languages=tokens)


def test_pretrained_weights_and_a_vocabulary_that_grows(tmp_path):
    first = build("gpt_neox")
    first.network.save_pretrained(tmp_path)
    again = AutoModelSettings(name=str(tmp_path), pretrained=True).build(V).eval()
    tokens = torch.randint(0, V, (1, 7))
    assert torch.equal(again(tokens), first(tokens))
    wider = AutoModelSettings(name=str(tmp_path), pretrained=True).build(V + 3).eval()
    assert wider.vocab_size == V + 3
    assert (wider(tokens)[..., :V] - first(tokens)).abs().max() <= 1e-5
    smaller = AutoModelSettings(name=str(tmp_path), pretrained=True).build(V - 3)
    assert smaller.vocab_size == V, "rows without a token stay"
    fresh = AutoModelSettings(name=str(tmp_path)).build(V).eval()
    assert not torch.equal(fresh(tokens), first(tokens))


def test_parameters_are_sorted_for_optimizers():
    tied, untied = build("gpt2"), build("gpt_neox")
    for model, heads in ((tied, 0), (untied, 1)):
        groups = split_parameters(model)
        assert len(groups.head) == heads
        count = len(groups.embedding) + len(groups.head) + len(groups.matrices) + len(groups.vectors)
        assert count == len(list(model.parameters()))
    other = copy.deepcopy(untied)
    assert other.head.weight is other.network.get_output_embeddings().weight
    other.load_state_dict(untied.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": None}, "model.name is not given"),
        ({"name": "gpt2", "kind": "decoder"}, "model.kind=decoder"),
        ({"name": "gpt2", "pretrained": "yes"}, "model.pretrained=yes"),
        ({"name": "gpt2", "overrides": [1]}, "model.overrides"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        AutoModelSettings(**options)


def test_models_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match="GPT2Config has no n_layerz"):
        AutoModelSettings(name="gpt2", overrides={"n_layerz": 2}).build(V)
    with pytest.raises(UserError, match=r"model\.name=t5 \(kind masked"):
        AutoModelSettings(name="t5", kind="masked").build(V)
    with pytest.raises(UserError, match="give a folder"):
        AutoModelSettings(name=str(tmp_path)).build(V)
