"""What the model families share: norms, rotary positions, attention and the head with its loss.

Shapes: B sequences, T positions, S positions with the cached ones, H heads, K key-value heads, E numbers a head,
D model width, V vocabulary, N positions of all sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import IGNORE_INDEX, UserError
from lmexp.model.kv_cache import Across, CrossCache, KVCache, Visible

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
"""Device type -> the most logits (positions x vocabulary) that the loss holds at once. A CPU's chunk (16 MiB of
float32) stays near its caches; a GPU's (1 GiB) is large enough to fill it."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned weight (D,) (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype.itemsize >= 4:
            return _rms_on_cpu(x, weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


def unit_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    if x.device.type == "cpu":
        return _rms_on_cpu(x, None, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _rms_on_cpu(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """torch has a kernel for other devices only; its parts cost a CPU twice as much."""
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    normed = _RMS.apply(x, weight, eps)
    assert isinstance(normed, Tensor)
    return normed


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """And what x was multiplied by."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    added = norm.new_full((), eps) if torch.compiler.is_compiling() else _constant(eps, norm.dtype)
    scale = torch.addcmul(added, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    y = x * scale
    return (y if weight is None else y.mul_(weight)), scale


@functools.cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """() on the CPU; to make one costs the norm of few rows some 40 % of its time."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_y: Tensor) -> tuple[Tensor | None, ...]:
        """LayerNorm's, at mean 0 and this scale, also takes the mean of the gradient away, which is put back."""
        (d,), (x, scale, weight) = d_y, ctx.saved_tensors
        width, mean = x.shape[-1], torch.zeros_like(scale)
        needed = [True, weight is not None, False]
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(d, x, [width], mean, scale, weight, None, needed)
        total = d.sum(-1, keepdim=True) if weight is None else (d @ weight)[..., None]
        return d_x.add_(scale * total / width), d_weight if needed[1] else None, None


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    squared = _ReLUSquared.apply(x)
    assert isinstance(squared, Tensor)
    return squared


class _ReLUSquared(torch.autograd.Function):
    """Its derivative 2 max(x, 0) needs no mask, which autograd would make; on a CPU that is half of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_y: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return d_y[0] * positive * 2


def residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of y, which a sublayer has just made and nothing else reads; not where that is a view of
    another tensor, whose gradient costs more than this saves."""
    if torch.compiler.is_compiling() or y.dtype != x.dtype or y._is_view():
        return x + y
    return y.add_(x)


def dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """In training x with a share p of its numbers at 0 and all others divided by 1 - p (Srivastava et al. 2014)."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * _kept(x.shape, p, x.dtype)


def _kept(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies with on a CPU, whose own generator takes most of a dropout's time: 0 with probability p,
    to within 2^-17, else the inverse of the share that is kept. All depends on torch's generator, by a seed."""
    share = min(round(p * 2**16), 2**16 - 1)  # of 2^16 equally likely numbers
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    n = math.prod(shape)
    drawn = np.random.SFC64(seed).random_raw(-(-n // 4)).view(np.int16)[:n]
    kept = torch.from_numpy(drawn) >= share - 2**15
    return kept.to(dtype).mul_(2**16 / (2**16 - share)).view(shape)


class FusedLinear(nn.Linear):
    """Several projections of one input in one matrix product.

    `parts` are the rows of the weight that each of them owns; an optimizer that treats matrices as wholes (Muon)
    reads it to take them apart. `spans` are those that devices share out, each alike (`tensor_parallel`): where the
    parts are single heads, all heads of the queries, of the keys and of the values.
    """

    def __init__(
        self, d_in: int, parts: tuple[int, ...], bias: bool = False, spans: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(d_in, sum(parts), bias=bias)
        self.parts = parts
        self.spans = parts if spans is None else spans


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, section 3.2.2), pairing number i of a head with i + E/2.

    The tables are computed once, in float32, and are no part of the state dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, d_head: int, max_length: int, theta: float) -> None:
        super().__init__()
        if d_head % 2:
            raise UserError(
                f"head width {d_head} is odd; rotary positions need an even one: change d_model or n_heads."
            )
        frequency = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angle = torch.outer(torch.arange(max_length, dtype=torch.float64), frequency)  # (max_length, E/2)
        # the sign of the rotated half stands in the table, so that a rotation is a roll, two products and a sum
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1).float(), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), -1).float(), persistent=False)

    def tables(self, start: int, length: int, positions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each (T, 1, E), or (B, T, 1, E) where `positions` (B, T) are given."""
        rows = slice(start, start + length) if positions is None else positions
        return self.cos[rows].to(dtype).unsqueeze(-2), self.sin[rows].to(dtype).unsqueeze(-2)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of numbers of x (B, T, ..., E) by its position's angle."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v (Vaswani et al. 2017, eq. 1), scale 1/sqrt(E) if None.

    q (B, H, T, E), k and v (B, K, S, E) with K a divisor of H (grouped queries); returns (B, T, H * E).
    """
    for record in _recording:
        record.append(_attention_weights(q, k, seen, scale))
    if _short_on_cpu(q, k, v):
        return _attend_short((q[None], k[None], v[None]), seen, dropout, scale)
    if dropout == 0 and _few_on_cpu(q, k, v):
        scale = _scale(q, scale)
        scores = (q if scale == 1 else q * scale) @ k.mT
        if seen.causal or seen.mask is not None:
            scores += _as_added(seen.mask, scores)
        return (torch.softmax(scores, -1, out=scores) @ v).transpose(1, 2).flatten(2)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen.mask,
        dropout_p=dropout,
        is_causal=seen.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def attend_to_self(
    qkv: Tensor, seen: Visible, cache: KVCache | None, layer: int, dropout: float, scale: float | None = None
) -> Tensor:
    """`attend` with queries, keys and values of one product, (B, T, 3, H, E), behind what a cache holds of the layer;
    returns (B, T, H * E)."""
    if cache is None:
        return _attend_fused((qkv,), seen, dropout, scale)
    parts = cache.by_text(qkv).permute(2, 0, 3, 1, 4)  # (3, G, H, R * T, E)
    k, v = cache.append_both(layer, parts[1:])  # (G, H, S, E)
    mixed = attend(parts[0], k, v, seen, dropout, scale)
    return mixed.view(*qkv.shape[:2], mixed.shape[-1])


def attend_behind(
    q: Tensor, k: Tensor, v: Tensor, seen: Visible, cache: KVCache | None, layer: int, scale: float | None = None
) -> Tensor:
    """`attend` of (B, T, H, E) with k and v (B, T, K, E) behind what a cache holds of the layer; returns
    (B, T, H * E)."""
    if cache is None:
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, scale=scale)
    shape = q.shape
    q, k, v = (cache.by_text(x).transpose(1, 2) for x in (q, k, v))  # (G, H or K, R * T, E)
    mixed = attend(q, *cache.append(layer, k, v), seen, scale=scale)
    return mixed.view(*shape[:2], mixed.shape[-1])


def attend_to_memory(
    q: Tensor,
    kv: nn.Module,
    memory: Tensor,
    across: Across,
    cache: CrossCache | None,
    layer: int,
    dropout: float,
    scale: float | None = None,
) -> Tensor:
    """`attend` of queries (B, U, H, E) to what `kv`, (B, S, D) to (B, S, 2 * H * E), makes of a memory (B, S, D);
    returns (B, U, H * E), zeros where nothing is seen. A cache keeps the layer's keys and values of (G, S, D)."""
    if cache is None:
        made = kv(memory).unflatten(-1, (2, *q.shape[2:]))  # (B, S, 2, H, E)
        mixed = _attend_fused((q.unsqueeze(2), made), across.seen, dropout, scale)
    else:
        if layer == len(cache.cross):
            made = kv(memory).unflatten(-1, (2, *q.shape[2:]))
            k, v = made.permute(2, 0, 3, 1, 4).contiguous()  # (G, H, S, E), read in every step
            cache.cross.append((k, v))
        k, v = cache.cross[layer]
        # the rows of a text as positions of one
        mask = across.seen.mask
        assert mask is None or len(mask) in (1, len(k)), "rows that share a text see the same of it"
        positions = q.reshape(len(k), q.shape[0] * q.shape[1] // max(1, len(k)), *q.shape[2:])
        mixed = attend(positions.transpose(1, 2), k, v, across.seen, dropout, scale)
    if across.some is not None:
        mixed = mixed * across.some
    return mixed.view(*q.shape[:2], mixed.shape[-1])


def _attend_fused(fused: Sequence[Tensor], seen: Visible, dropout: float, scale: float | None) -> Tensor:
    """`attend` with tensors (B, T or S, n, H, E) that hold queries, keys and values, in this order."""
    parts = [x.permute(2, 0, 3, 1, 4) for x in fused]  # (n, B, H, T or S, E)
    if not _recording and _short_on_cpu(parts[0][0], parts[-1][0], parts[-1][-1]):
        return _attend_short(parts, seen, dropout, scale)
    q, k, v = (x for part in parts for x in part)
    return attend(q, k, v, seen, dropout, scale)


def _short_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the weights of attention are few enough for a CPU that holding them costs less than making them twice."""
    return (
        torch.is_grad_enabled()
        and q.device.type == "cpu"
        and q.shape[1] == k.shape[1]
        and q.dtype == k.dtype == v.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and 1 < q.shape[2] <= k.shape[2] <= 128
        and not torch.compiler.is_compiling()
    )


_FEW = 2**16
"""Weights of all heads, up to which it costs a CPU less to hold them: some of its second cache."""


def _few_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's kernel would take longer than its parts, as where a few queries of a text meet all its keys; a
    single one is faster there."""
    return (
        not torch.is_grad_enabled()
        and q.device.type == "cpu"
        and q.shape[2] > 1
        and q.shape[1] == k.shape[1]
        and q.shape[:3].numel() * k.shape[2] <= _FEW
        and q.dtype == k.dtype == v.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _attend_short(parts: Sequence[Tensor], seen: Visible, dropout: float, scale: float | None) -> Tensor:
    mixed = _ShortAttention.apply(seen.mask, seen.causal, _scale(parts[0], scale), dropout, *parts)
    assert isinstance(mixed, Tensor)
    return mixed.transpose(1, 2).flatten(2)


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _as_added(mask: Tensor | None, scores: Tensor) -> Tensor:
    """What is added to scores (..., T, S); without a mask nothing later is seen. A boolean one is the same for all
    heads: to make a sum of it takes a third of the time of a fill."""
    if mask is None:
        return scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -math.inf)


class _ShortAttention(torch.autograd.Function):
    """Attention that keeps its weights for the backward pass, whose mask may have a gradient (T5's biases).

    Of torch's kernels for CPUs, the one without weights takes longer here, and the one for masks that need a gradient
    looks for rows that see nothing, of which there are none. Queries, keys and values come in tensors (n, B, H, T or
    S, E) of one or several of them, so that those of one product are brought into line at once, and so are their
    gradients.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, causal: bool, scale: float, dropout: float, *parts: Tensor) -> Tensor:
        lined = [x.flatten(1, 2) for x in parts]  # (n, B * H, T or S, E)
        q, k, v = (x for part in lined for x in part)
        heads = parts[0].shape[1:3]
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
        if causal or mask is not None:
            scores.unflatten(0, heads).add_(_as_added(mask, scores))
        weights = torch.softmax(scores, -1, out=scores)
        kept = _kept(weights.shape, dropout, weights.dtype) if dropout else None
        ctx.save_for_backward(weights, kept, *lined)
        ctx.scale, ctx.heads, ctx.mask_shape = scale, heads, None if mask is None else mask.shape
        return torch.bmm(weights if kept is None else weights * kept, v).unflatten(0, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        weights, kept, *lined = ctx.saved_tensors
        d = d_out[0].flatten(0, 1)
        d_lined = [torch.empty_like(x) for x in lined]
        q, k, v = (x for part in lined for x in part)
        d_q, d_k, d_v = (x for part in d_lined for x in part)
        torch.bmm((weights if kept is None else weights * kept).mT, d, out=d_v)
        d_weights = torch.bmm(d, v.mT)
        if kept is not None:
            d_weights *= kept
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype, grad_input=d_weights)
        d_mask = d_scores.unflatten(0, ctx.heads).sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[0] else None
        torch.baddbmm(d_q, d_scores, k, beta=0, alpha=ctx.scale, out=d_q)
        torch.baddbmm(d_k, d_scores.mT, q, beta=0, alpha=ctx.scale, out=d_k)
        return d_mask, None, None, None, *(x.unflatten(1, ctx.heads) for x in d_lined)


_recording: list[list[Tensor]] = []


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Collects the attention weights (B, H, T, S) of every call of `attend` inside, in the order of the calls."""
    record: list[Tensor] = []
    _recording.append(record)
    try:
        yield record
    finally:
        _recording.remove(record)


def _attention_weights(q: Tensor, k: Tensor, seen: Visible, scale: float | None) -> Tensor:
    """softmax(q k^T * scale) (B, H, T, S), which `attend` need not hold."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.detach() @ k.detach().mT * _scale(q, scale)
    if seen.mask is not None:
        scores = scores.masked_fill(~seen.mask, -torch.inf) if seen.mask.dtype == torch.bool else scores + seen.mask
    elif seen.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.float().softmax(-1)


class Head(nn.Module):
    """From hidden states to logits over the vocabulary, and the cross entropy that never holds all of them."""

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        tied: nn.Embedding | None = None,
        bias: bool = False,
        softcap: float | None = None,
    ) -> None:
        """`tied`: share this embedding's weight (V, D). `softcap` c: logits become c * tanh(logits / c)."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied is None else tied.weight
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.softcap = softcap
        self.packed: Tensor | None = None
        """The weight as oneDNN wants it for few rows, for logits alone; decoding sets it for a while."""
        self._chunk = _chunk_loss

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place, the loss too."""
        super().compile(*args, **kwargs)
        self._chunk = torch.compile(_chunk_loss, *args, **kwargs)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), at least float32, of hidden states (..., D)."""
        if self.packed is None or torch.compiler.is_compiling():
            return _logits(hidden, self.weight, self.bias, self.softcap)
        logits: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")
        return _capped(logits, self.softcap)

    def pack(self, rows: int) -> None:
        """Multiply with another layout of the weight, which is the fastest for so many rows and is not to be changed
        meanwhile, until `packed` is None. Without gradients; whole float32 on CPUs, for all else nothing is done."""
        if (
            torch.backends.mkldnn.is_available()
            and self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and torch.get_float32_matmul_precision() == "highest"
        ):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        n_chunks: int | None = None,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """-log softmax(logits)[label] over the positions whose label is not `IGNORE_INDEX`.

        hidden (N, D), labels (N,) int64. Returns the sum () or, without gradients only, each position's loss (N,),
        0 where it is not scored; both at least float32. `n_chunks`: how many pieces the positions are cut into;
        None: as many as `CHUNK_ELEMENTS` asks for. The gradients are made along with the loss, piece by piece (as in
        fused linear cross entropy, Hsu et al. 2024, Liger kernel, section 3.2), so that the memory stays that of one
        piece.
        """
        n, device = labels.shape[0], hidden.device.type
        if n_chunks is None:
            limit = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"])
            n_chunks = max(1, math.ceil(n * self.weight.shape[0] / limit))
        with_grad = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        assert reduction == "sum" or not with_grad, "losses of single positions have no gradients"
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if with_grad:
            loss = _ChunkedLoss.apply(
                hidden, self.weight, self.bias, labels, self.softcap, n_chunks, dtype, self._chunk
            )
            assert isinstance(loss, Tensor)
            return loss
        hidden, weight = (t if dtype is None else t.to(dtype) for t in (hidden, self.weight))
        bias = self.bias if self.bias is None or dtype is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            pieces = [
                self._chunk(h, weight, bias, y, self.softcap, False)[0]
                for h, y in zip(hidden.chunk(n_chunks), labels.chunk(n_chunks), strict=True)
            ]
        losses = torch.cat(pieces)
        return losses.sum() if reduction == "sum" else losses

    def smoothing(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """How far the label's logit is above the mean of all, summed () over the scored positions.

        e times this, added to `loss`, makes that the cross entropy with 1 - e of the label and e of all tokens alike
        (label smoothing, Szegedy et al. 2016, section 7). hidden (N, D), labels (N,). Not with a softcap.
        """
        assert self.softcap is None, "the mean of capped logits is not that of the weights"
        scored = labels != IGNORE_INDEX
        labels = labels.clamp_min(0)
        above = (hidden * (self.weight[labels] - self.weight.mean(0))).sum(-1)
        if self.bias is not None:
            above = above + self.bias[labels] - self.bias.mean()
        return _at_least_float32(above)[scored].sum()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    return _capped(_at_least_float32(F.linear(hidden, weight, bias)), softcap)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunk_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) of a piece of n positions, 0 where it is not scored; if asked for, d(loss) / d(logits) (n, V) of each
    position as if all were scored. Never differentiated, so that it may write over what it has read."""
    logits = _at_least_float32(F.linear(hidden, weight, bias))
    capped = None
    if softcap is not None:
        capped = logits.div_(softcap).tanh_()
        logits = capped * softcap
    index = labels.clamp_min(0)[:, None]
    if with_grad and logits.device.type == "cpu" and not torch.compiler.is_compiling():
        gradient = torch.softmax(logits, -1, out=logits)  # a third of the time of a log_softmax and its exponentials
        p = gradient.gather(-1, index)[:, 0]
        log_p = p.log()
        rare = ((p < 1e-30) & (labels != IGNORE_INDEX)).nonzero()[:, 0]  # close to what a float32 cannot hold
        if len(rare):
            those = _logits(hidden[rare], weight, bias, softcap).log_softmax(-1)
            log_p[rare] = those.gather(-1, index[rare])[:, 0]
    else:
        gradient = logits.log_softmax(-1)
        log_p = gradient.gather(-1, index)[:, 0]
        if with_grad:
            gradient = gradient.exp_()
    losses = torch.where(labels != IGNORE_INDEX, -log_p, 0.0)
    if not with_grad:
        return losses, None
    gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
    if capped is not None:
        gradient.addcmul_(gradient, capped.square_(), value=-1)  # d tanh = 1 - tanh^2
    return losses, gradient.to(hidden.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross entropies whose gradients are computed in the forward pass, a piece at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        n_chunks: int,
        dtype: torch.dtype | None,
        chunk: Any,
    ) -> Tensor:
        h, w, b = (t if t is None or dtype is None else t.to(dtype) for t in (hidden, weight, bias))
        assert h is not None
        assert w is not None
        # a frozen head, as under adapters, needs none of its own
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            pieces = h.chunk(n_chunks)
            d_pieces = [None] * len(pieces) if d_hidden is None else d_hidden.chunk(n_chunks)
            for rows, y, d_rows in zip(pieces, labels.chunk(n_chunks), d_pieces, strict=True):
                losses, d_logits = chunk(rows, w, b, y, softcap, True)
                total = total + losses.sum()
                # positions that are not scored are left out where that is D numbers each, not V
                scored = (y != IGNORE_INDEX).to(rows.dtype)[:, None]
                if d_rows is not None:
                    torch.mul(d_logits @ w, scored, out=d_rows)
                if ctx.needs_input_grad[1]:
                    d_weight = _summed(d_weight, d_logits.mT, rows * scored, weight.dtype)
                if d_bias is not None:
                    d_bias += (scored.mT @ d_logits)[0]
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, d = ctx.saved_tensors, d_loss[0]
        if d.device.type != "cpu" or d != 1:  # another device would make the host wait for the test
            gradients = tuple(None if g is None else g * d.to(g.dtype) for g in gradients)
        return (*gradients, None, None, None, None, None)


def _summed(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in `dtype`, in place; a total of None is 0."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


def check_heads(name: str, d_model: int, n_heads: int) -> None:
    """Raise `UserError` unless the width divides into the heads."""
    if d_model % n_heads:
        raise UserError(f"{name}.d_model={d_model} is no multiple of n_heads={n_heads}; change one of them.")


def check_positive(name: str, **values: float) -> None:
    """Raise `UserError` for the first value that is not positive."""
    for key, value in values.items():
        if value <= 0:
            raise UserError(f"{name}.{key}={value}; expected a positive number.")


def check_fraction(name: str, **values: float) -> None:
    """Raise `UserError` for the first value outside [0, 1)."""
    for key, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"{name}.{key}={value}; expected a number of at least 0 and less than 1.")


def check_start_id(start_id: int, vocab_size: int | None = None) -> None:
    """Raise `UserError` unless a decoder can begin with this token; `vocab_size`: how many there are, once known."""
    if start_id < 0:
        raise UserError(f"model.decoder_start_id={start_id}; expected a token id of at least 0.")
    if vocab_size is not None and start_id >= vocab_size:
        raise UserError(
            f"model.decoder_start_id={start_id}; expected a token id below the vocabulary's size {vocab_size}: set it "
            "to the id of the token that the decoder's input begins with."
        )


def round_up(vocab_size: int, multiple: int) -> int:
    """The smallest multiple that is at least `vocab_size`."""
    return -(-vocab_size // multiple) * multiple


def training_flops(model: nn.Module, lookups: int, d_attention: int, n_layers: int, length: int) -> float:
    """FLOPs a token of a training step: 6 (P - lookups) + 12 n_layers * length * d_attention.

    P counts each parameter once, `lookups` those that are only looked up, not multiplied (PaLM, Chowdhery et al.
    2022, appendix B; attention is counted over the whole length, though half of it is masked).
    """
    n_parameters = sum(p.numel() for p in model.parameters())
    return 6.0 * (n_parameters - lookups) + 12.0 * n_layers * length * d_attention
