"""Attention, rotary positions and the head's loss against their formulas in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmexp.contracts import IGNORE_INDEX, UserError
from lmexp.model import layers
from lmexp.model.kv_cache import KVCache, Visible, visible
from lmexp.model.layers import (
    CHUNK_ELEMENTS,
    Head,
    RMSNorm,
    Rotary,
    attend,
    dropped,
    relu_squared,
    rotate,
    unit_rms,
)


def reference_attention(q, k, v, mask):
    """softmax(Q K^T / sqrt(d)) V, a head at a time; keys and values repeated for their group."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_its_formula(heads, kv_heads, packed):
    torch.manual_seed(0)
    q = torch.randn(2, heads, 7, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 7, 8, dtype=torch.float64)
    tokens = torch.zeros(2, 7, dtype=torch.long)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, -1]]) if packed else None
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    out = attend(q, k, v, visible(tokens, documents, None))
    torch.testing.assert_close(out, reference_attention(q, k, v, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "added", "of each head"])
@pytest.mark.parametrize("rows", [2, 7])
def test_attention_of_few_queries_is_its_formula(rows, kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, rows, 8), *torch.randn(2, 3, 4, 7, 8)
    allowed = (torch.rand(3, 4 if kind == "of each head" else 1, rows, 7) < 0.6) | torch.eye(rows, 7, dtype=torch.bool)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    if kind == "none":
        mask, allowed = None, torch.ones(rows, 7, dtype=torch.bool)
    elif kind == "causal":
        k, v = k[:, :, :rows], v[:, :, :rows]
        mask, allowed = None, torch.ones(rows, rows, dtype=torch.bool).tril()
    else:
        mask = allowed if kind == "boolean" else added
    with torch.inference_mode():
        out = attend(q, k, v, Visible(mask, kind == "causal"))
        single = attend(
            q.double(), k.double(), v.double(), Visible(None if mask is None else allowed, kind == "causal")
        )
    torch.testing.assert_close(out, reference_attention(q, k, v, allowed), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_whose_weights_are_dropped(masked):
    """Both ways with the mask that was drawn, against the formula; and the mean over draws is that without any."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 7, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 7, 7) < 0.8 if masked else None
    mask = mask | torch.eye(7, dtype=torch.bool) if mask is not None else None
    torch.manual_seed(1)
    out = attend(q, k, v, Visible(mask, causal=False), dropout=0.25)
    torch.manual_seed(1)
    kept = layers._kept(torch.Size([8, 7, 7]), 0.25, torch.float32).view(2, 4, 7, 7)
    scores = q @ k.mT / math.sqrt(8)
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    expected = ((weights * kept) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    change = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, [q, k, v], change) for y in (out, expected)]
    torch.testing.assert_close(*gradients)
    draws = torch.stack([attend(q, k, v, Visible(mask, causal=False), dropout=0.25).detach() for _ in range(4000)])
    mean = attend(q, k, v, Visible(mask, causal=False))
    assert (draws.mean(0) - mean).abs().max() < 6 * draws.std(0).max() / math.sqrt(4000)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropped_numbers(p):
    torch.manual_seed(0)
    x = torch.rand(300, 1001, requires_grad=True) + 1
    y = dropped(x, p, training=True)
    gone = y == 0
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(gone.float().mean() - p) < 5 * deviation
    torch.testing.assert_close(y[~gone], (x / (1 - p))[~gone], rtol=1e-4, atol=0)  # p is one of 2^16 numbers
    pairs = gone[:, 1:].float() @ gone[:, :-1].float().T  # no row, shifted by one, is like another
    assert (pairs / 1000 - p * p).abs().max() < 8 * p / math.sqrt(1000)
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(gradient == 0, gone)
    torch.manual_seed(0)
    torch.rand(300, 1001)
    assert torch.equal(dropped(x, p, training=True), y)  # as torch's generator says
    assert not torch.equal(dropped(x, p, training=True), y)
    assert dropped(x, p, training=False) is x
    assert dropped(x, 0.0, training=True) is x


def test_attention_scale():
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    halved = attend(q, k, v, Visible(None, True), scale=0.25)
    torch.testing.assert_close(halved, attend(q / 2, k, v, Visible(None, True)))


def test_cached_positions_stand_left():
    cache = KVCache(1, 2, 1, 9, 4, "cpu", torch.float32)
    cache.length = 3
    seen = visible(torch.zeros(2, 2, dtype=torch.long), None, cache)
    assert seen.mask is not None
    assert seen.mask[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_rotary_is_a_complex_rotation():
    rotary = Rotary(8, 16, 100.0)
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 1, 15, 3]])
    frequency = torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)])
    angle = positions[..., None, None] * frequency
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotate(x, rotary.tables(0, 5, positions, x.dtype)), expected, rtol=1e-5, atol=1e-5)
    plain = rotate(x[:1], rotary.tables(0, 5, None, x.dtype))
    torch.testing.assert_close(plain, expected[:1], rtol=1e-5, atol=1e-5)
    assert not rotary.state_dict()


def test_odd_heads_are_refused():
    with pytest.raises(UserError, match="7"):
        Rotary(7, 16, 100.0)


def test_rms_norm_is_its_formula():
    norm = RMSNorm(6, 1e-3).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)


def test_unit_rms_and_relu_squared_are_their_formulas():
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(relu_squared(x), F.relu(x).square())
    assert torch.autograd.gradcheck(unit_rms, x)
    assert torch.autograd.gradcheck(relu_squared, x)


def reference_loss(head, hidden, labels):
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def problem(bias=False, softcap=None, n=37, d=12, v=23, dtype=torch.float64):
    torch.manual_seed(0)
    head = Head(d, v, bias=bias, softcap=softcap).to(dtype)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    labels[::5] = IGNORE_INDEX
    return head, hidden, labels


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("n_chunks", [1, 2, 5, 37])
def test_loss_and_gradients(bias, softcap, n_chunks):
    head, hidden, labels = problem(bias, softcap)
    expected = reference_loss(head, hidden, labels)
    wanted = torch.autograd.grad(expected * 3, [hidden, *head.parameters()])
    loss = head.loss(hidden, labels, n_chunks=n_chunks)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(loss * 3, [hidden, *head.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(head.loss(hidden, labels, n_chunks=n_chunks), expected, rtol=1e-6, atol=0)
        single = head.loss(hidden, labels, n_chunks=n_chunks, reduction="none")
    assert single.shape == labels.shape
    assert (single[labels == IGNORE_INDEX] == 0).all()
    torch.testing.assert_close(single.sum(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("softcap", [None, 300.0])
def test_loss_of_labels_too_unlikely_for_float32(softcap):
    """exp(-200) is 0 in float32, its logarithm is not."""
    torch.manual_seed(0)
    head = Head(8, 5, softcap=softcap)
    hidden = 40 * torch.eye(8)[:6]
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, 8) * 6)
    labels = torch.tensor([0, 1, 2, 3, 4, IGNORE_INDEX])
    hidden.requires_grad_()
    loss = head.loss(hidden, labels, n_chunks=2)
    double = hidden.detach().double().requires_grad_()
    logits = double @ head.weight.detach().double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    assert expected > 200
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (got,) = torch.autograd.grad(loss, [hidden])
    torch.testing.assert_close(got.double(), torch.autograd.grad(expected, [double])[0], rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_tied_weight():
    table = torch.nn.Embedding(23, 12).double()
    head = Head(12, 23, tied=table)
    assert head.weight is table.weight
    labels = torch.randint(0, 23, (30,))
    got, want = (
        torch.autograd.grad(loss(table(labels)), table.weight)[0]
        for loss in (lambda x: head.loss(x, labels, n_chunks=4), lambda x: reference_loss(head, x, labels))
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_loss_under_autocast(n_chunks):
    head, hidden, labels = problem(n=64, d=32, v=50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(hidden, labels, n_chunks=n_chunks)
        loss.backward()
        with torch.no_grad():
            silent = head.loss(hidden, labels, n_chunks=n_chunks)
    assert loss.dtype == torch.float32
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(silent, loss.detach(), rtol=1e-5, atol=0)
    exact = reference_loss(head, hidden, labels)
    torch.testing.assert_close(loss.detach(), exact.detach(), rtol=0.02, atol=0)
    # bf16 has eight bits
    for got, want in zip(
        (hidden.grad, head.weight.grad), torch.autograd.grad(exact, [hidden, head.weight]), strict=True
    ):
        assert (got - want).norm() < 0.02 * want.norm()


class Largest(TorchDispatchMode):
    """Records the most numbers that one operation's result has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_loss_never_holds_all_logits():
    head, hidden, labels = problem(n=64, d=4, v=100)
    with Largest() as seen:
        head.loss(hidden, labels, n_chunks=8).backward()
        with torch.no_grad():
            head.loss(hidden, labels, n_chunks=8, reduction="none")
    assert seen.numel == 64 * 100 // 8
    with Largest() as seen:
        reference_loss(head, hidden, labels).backward()
    assert seen.numel == 64 * 100


def test_chunks_follow_from_the_bound(monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1000)
    head, hidden, labels = problem(n=64, d=4, v=100)
    with Largest() as seen:
        head.loss(hidden, labels).backward()
    assert seen.numel <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("n_chunks", [1, 3])
def test_compiled_loss(n_chunks):
    head, hidden, labels = problem(softcap=3.0, dtype=torch.float32)
    expected = torch.autograd.grad(reference_loss(head, hidden, labels), [hidden, head.weight])
    head.compile()
    got = torch.autograd.grad(head.loss(hidden, labels, n_chunks=n_chunks), [hidden, head.weight])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert list(head.state_dict()) == ["weight"]


@pytest.mark.parametrize("bias", [False, True])
def test_smoothing_makes_the_loss_that_of_torch(bias):
    torch.manual_seed(0)
    head = Head(6, 11, bias=bias).double()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (9,))
    labels[::4] = IGNORE_INDEX
    ours = head.loss(hidden, labels) + 0.1 * head.smoothing(hidden, labels)
    theirs = F.cross_entropy(head(hidden), labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    inputs = (hidden, *head.parameters())
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)
