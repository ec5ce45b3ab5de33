"""Muon and AdamW: against torch's AdamW, the singular value decomposition, and themselves resumed."""

import copy
import io

import pytest
import torch
from torch import nn

from lmexp.contracts import UserError
from lmexp.model.fast import FastConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.llama import LlamaConfig
from lmexp.optimizer.adamw import AdamW
from lmexp.optimizer.groups import split_parameters
from lmexp.optimizer.muon import Muon, orthogonalize

MODELS = {
    "gpt": GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=12),
    "llama": LlamaConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, d_ff=24, max_length=12),
    "fast": FastConfig(n_layers=2, n_heads=2, d_model=16, max_length=12, value_layers=1, residual_gates=True),
}
MUON = Muon(lr=0.02, embedding_lr=0.01, head_lr=0.005, vector_lr=0.003, weight_decay=0.1)
ADAMW = AdamW(lr=1e-2)


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name].build(31)


def train(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 31, (2, 9), generator=generator)
        model.head.loss(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).div(16).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 10)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [ADAMW, MUON])
def test_each_parameter_is_in_one_group(name, make):
    model = build(name)
    optimizer = make.build(model)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"]
        assert all((p.dim() == 1) == (group["name"] == "vectors") for p in group["params"])
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert ("head" in names) == (name != "gpt")  # a tied head is its embedding


def test_hidden_matrices_know_their_parts():
    parts = {tuple(m.weight.shape): m.parts for m in split_parameters(build("llama")).matrices}
    assert parts[(32, 16)] == (4,) * 8
    assert parts[(48, 16)] == (24, 24)
    assert parts[(16, 24)] == (16,)


def test_frozen_parameters_are_left_out():
    model = build("fast")
    model.embed.weight.requires_grad_(False)
    assert all(p is not model.embed.weight for g in MUON.build(model).param_groups for p in g["params"])


def test_decay_only_on_matrices():
    for make, decayed in ((ADAMW, {"embedding", "head", "matrices"}), (MUON, {"matrices"})):
        model = build("llama")
        before = copy.deepcopy(list(model.parameters()))
        optimizer = make.build(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        where = {id(p): g["name"] for g in optimizer.param_groups for p in g["params"]}
        rate = make.lr * make.weight_decay
        for p, old in zip(model.parameters(), before, strict=True):
            expected = old * (1 - rate) if where[id(p)] in decayed else old
            torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False, "auto"])
def test_other_half_is_torchs_adamw(fused):
    model = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8))
    other = copy.deepcopy(model)
    rates = {"lr": 0.0, "head_lr": 0.0, "embedding_lr": 0.01, "vector_lr": 0.002}
    ours = Muon(**rates, betas=(0.8, 0.9), eps=1e-8, fused=fused).build(model)
    groups = [{"params": other[0].parameters(), "lr": 0.01}, {"params": other[1].parameters(), "lr": 0.002}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.0, foreach=False)
    for step in range(5):
        tokens = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(step))
        for m, optimizer in ((model, ours), (other, reference)):
            m(tokens).pow(3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 7), (32, 33)])
@pytest.mark.parametrize(("steps", "tolerance"), [(5, 0.25), (7, 0.01)])
def test_orthogonalisation_is_u_v(shape, steps, tolerance):
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = u @ torch.diag_embed(s.clamp_min(0.02 * s.amax(-1, keepdim=True))) @ v
    got = orthogonalize(x, steps)
    values = torch.linalg.svdvals(got)
    assert (values - 1).abs().max() < tolerance
    # the singular vectors are exactly the input's: what is left, u^T got v^T, is diagonal
    torch.testing.assert_close(u.mT @ got @ v.mT, torch.diag_embed((u.mT @ got @ v.mT).diagonal(dim1=-2, dim2=-1)))
    assert (got - u @ v).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 7)])
def test_preconditioned_rows_begin_closer_to_one(shape):
    torch.manual_seed(0)
    x = 1e-4 * torch.randn(3, *shape, dtype=torch.float64) + 1e-4
    wide = x if shape[0] <= shape[1] else x.mT
    overlaps = torch.einsum("nik,njk->nij", wide, wide).abs().sum(-1, keepdim=True)
    scaled = wide / overlaps.sqrt()
    u, s, v = torch.linalg.svd(scaled, full_matrices=False)
    assert s.max() <= 1 + 1e-9  # Prach & Lampert 2022, theorem 1
    assert (s >= torch.linalg.svdvals(x / x.norm(dim=(-2, -1), keepdim=True)) - 1e-9).all()
    got = orthogonalize(x, 7, precondition=True)
    got = got if shape[0] <= shape[1] else got.mT
    assert (got - u @ v).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_a_batch_is_one_by_one(shape):
    x = torch.randn(5, *shape)
    single = torch.cat([orthogonalize(one[None], 5) for one in x])
    torch.testing.assert_close(orthogonalize(x, 5), single, rtol=1e-4, atol=1e-4)


def test_zero_gradient_changes_nothing():
    assert (orthogonalize(torch.zeros(2, 4, 16), 5) == 0).all()


@pytest.mark.parametrize("scale", ["spectral", "rms"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_step_is_its_formula(scale, nesterov):
    torch.manual_seed(0)
    model = nn.Linear(6, 24, bias=False)
    rates = {"embedding_lr": 0.0, "head_lr": 0.0, "vector_lr": 0.0}
    make = Muon(lr=0.1, momentum=0.9, nesterov=nesterov, steps=7, scale=scale, weight_decay=0.5, **rates)
    optimizer = make.build(model)
    weight = model.weight.detach().double().clone()
    average = torch.zeros_like(weight)
    size = 2.0 if scale == "spectral" else 0.2 * 24**0.5
    for _ in range(3):
        model.weight.grad = torch.randn_like(model.weight)
        gradient = model.weight.grad.double()
        average = 0.9 * average + 0.1 * gradient
        u, _s, v = torch.linalg.svd(0.9 * average + 0.1 * gradient if nesterov else average, full_matrices=False)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * size * (u @ v)
        optimizer.step()
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-2, atol=1e-3)


def test_fused_projections_are_separate():
    torch.manual_seed(0)
    fused, plain = nn.Linear(8, 12, bias=False), nn.ModuleList(nn.Linear(8, n, bias=False) for n in (6, 4, 2))
    fused.parts = (6, 4, 2)
    gradient = torch.randn(12, 8)
    rates = {"lr": 0.1, "embedding_lr": 0.0, "head_lr": 0.0, "vector_lr": 0.0}
    with torch.no_grad():
        fused.weight.copy_(torch.cat([p.weight for p in plain]))
    fused.weight.grad = gradient.clone()
    for module, g in zip(plain, gradient.split((6, 4, 2)), strict=True):
        module.weight.grad = g.clone()
    Muon(**rates).build(fused).step()
    Muon(**rates).build(plain).step()
    torch.testing.assert_close(fused.weight, torch.cat([p.weight for p in plain]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [ADAMW, MUON])
def test_resume_is_exact(name, make):
    straight = build(name)
    train(straight, make.build(straight), 0, 6)

    first = build(name)
    optimizer = make.build(first)
    train(first, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = build(name, seed=9)
    second.load_state_dict(saved["model"])
    optimizer = make.build(second)
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, 3, 6)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [ADAMW, MUON])
def test_it_learns(make):
    model = build("fast")
    optimizer = make.build(model)
    tokens = torch.randint(0, 31, (4, 9))
    losses = []
    for _ in range(40):
        loss = model.head.loss(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / 32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdamW(lr=-1.0),
        lambda: AdamW(lr=1.0, betas=(0.9, 1.0)),
        lambda: AdamW(lr=1.0, fused="maybe"),
        lambda: Muon(lr=0.1, embedding_lr=0.1, head_lr=0.1, vector_lr=0.1, steps=9),
        lambda: Muon(lr=0.1, embedding_lr=0.1, head_lr=0.1, vector_lr=0.1, scale="big"),
        lambda: Muon(lr=0.1, embedding_lr=0.1, head_lr=0.1, vector_lr=0.1, momentum=1.0),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(UserError, match="optimizer"):
        make()
