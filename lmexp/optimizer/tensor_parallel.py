"""Tensor parallelism: the heads of attention and the inner numbers of feed-forwards are shared out among devices that
read the same batch (Shoeybi et al. 2019, Megatron-LM, section 3).

In a block the first product (queries, keys, values; the way into the feed-forward) keeps a share of its outputs on each
device, the second (the way back) a share of its inputs, and the devices add up what it gives: two sums in the forward
pass, two in the backward one. Embeddings, norms and the head are whole on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import UserError

FIRST = ("qkv", "q", "kv", "expand")
"""Names, in blocks, of the products whose outputs are shared out."""

SECOND = ("output", "contract")
"""Names of the products whose inputs are."""

OF_A_HEAD = ("q_norm", "k_norm")
"""Names of what is used for each head alike: each device sees the gradient of its own heads only."""


@dataclass(frozen=True)
class Share:
    """How a parameter is shared out among the devices of a group, and put together again."""

    dim: int
    """The dimension that is cut."""

    spans: tuple[int, ...]
    """Neighbouring lengths of it, of each of which every device gets the same part: queries, keys and values."""

    group: Any
    """The devices."""

    def piece(self, x: Tensor) -> Tensor:
        """This device's share of a whole tensor."""
        n, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        return torch.cat([span.chunk(n, self.dim)[rank] for span in x.split(self.spans, self.dim)], self.dim)

    def whole(self, piece: Tensor) -> Tensor:
        """The whole of what every device has its share of. Collective."""
        n = dist.get_world_size(self.group)
        pieces = [torch.empty_like(piece) for _ in range(n)]
        dist.all_gather(pieces, piece.contiguous(), group=self.group)
        cut = [p.split([span // n for span in self.spans], self.dim) for p in pieces]
        return torch.cat([part for span in zip(*cut, strict=True) for part in span], self.dim)


def share_of(p: Tensor) -> Share | None:
    """How this parameter is shared out, None for one that is whole."""
    return getattr(p, "share", None)


class TensorParallel:
    """A model that is shared out: what was changed in it, and how to undo that for a while."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], group: Any) -> None:
        """Share out the weights of the blocks, whole and the same on every device before. Raises `UserError` for a
        model that cannot be."""
        self.group, self.n = group, dist.get_world_size(group)
        self.linears: list[tuple[nn.Linear, dict[str, Share]]] = []
        self.heads: list[tuple[nn.Module, str, int]] = []
        self.of_heads: list[tuple[nn.Module, int]] = []
        self.of_a_head: list[nn.Module] = []
        check_shares(model, blocks, self.n)
        for block in blocks:
            for path, part in block.named_modules():
                name = path.rpartition(".")[2]
                if name in FIRST:
                    self._share_out(part, first=True)
                elif name in SECOND:
                    self._share_out(part, first=False)
                elif name in OF_A_HEAD:
                    self.of_a_head.append(part)
                self.heads += [(part, key, count) for key, count in _heads_of(part).items()]
        for part in model.modules():
            if (dim := getattr(part, "heads_dim", None)) is not None:
                self.of_heads.append((part, dim))
        self._part()
        self.mark()

    def _share_out(self, linear: Any, first: bool) -> None:
        spans = getattr(linear, "spans", (linear.out_features,)) if first else (linear.in_features,)
        shares = {"weight": Share(0 if first else 1, spans, self.group)}
        if first and linear.bias is not None:
            shares["bias"] = Share(0, spans, self.group)
        for name, share in shares.items():
            p = getattr(linear, name)
            with torch.no_grad():
                setattr(linear, name, nn.Parameter(share.piece(p), p.requires_grad))
        self.linears.append((linear, shares))

    def mark(self) -> None:
        """Leave its share on each parameter, for optimizers and checkpoints; again when parameters were replaced."""
        for linear, shares in self.linears:
            for name, share in shares.items():
                getattr(linear, name).share = share

    def _part(self) -> None:
        """Let every device work with what it has."""
        for linear, shares in self.linears:
            first = shares["weight"].dim == 0
            linear.forward = partial(_first if first else _second, linear, self.group)  # type: ignore[method-assign]
        for part, dim in self.of_heads:
            part.forward = partial(_own_heads, type(part).forward, part, dim, self.group)
        for part, key, count in self.heads:
            setattr(part, key, count // self.n)

    @contextmanager
    def united(self) -> Iterator[None]:
        """Every device has all of it inside, and works by itself. Collective."""
        for linear, shares in self.linears:
            whole = {
                name: shares[name].whole(p.detach()) if name in shares else p.detach()
                for name, p in linear.named_parameters()
            }
            linear.forward = partial(F.linear, **whole)  # type: ignore[method-assign]
        for part, _ in self.of_heads:
            del part.forward
        for part, key, count in self.heads:
            setattr(part, key, count)
        try:
            yield
        finally:
            self._part()

    def sum_gradients(self) -> None:
        """Add up, over the devices, the gradients of what is used for each head alike. Collective."""
        for part in self.of_a_head:
            for p in part.parameters():
                if p.grad is not None:
                    grad: Any = p.grad
                    dist.all_reduce(grad.to_local() if hasattr(grad, "to_local") else grad, group=self.group)


def _heads_of(part: nn.Module) -> dict[str, int]:
    counts: Any = part
    return {key: getattr(counts, key) for key in ("n_heads", "n_kv_heads") if hasattr(part, key)}


def check_shares(model: nn.Module, blocks: list[nn.Module], n: int) -> None:
    """Raise `UserError` unless heads and feed-forwards of the model can be shared out among n devices."""
    found = False
    for block in blocks:
        for path, part in block.named_modules():
            name = path.rpartition(".")[2]
            if name in FIRST and not isinstance(part, nn.Linear):
                raise UserError(
                    "trainer.tensor_parallel does not go together with task.lora, whose adapters would have to be "
                    "shared out too; set trainer.tensor_parallel=1."
                )
            sizes = _heads_of(part)
            if name == "contract":
                found = True
                sizes["d_ff"] = part.in_features
            for key, size in sizes.items():
                if size % n:
                    raise UserError(
                        f"trainer.tensor_parallel={n} does not divide model.{key}={size}; change one of them."
                    )
    if not found:
        raise UserError(
            f"trainer.tensor_parallel={n}: {type(model).__name__} has no blocks that are known to be shared out; set "
            "trainer.tensor_parallel=1, or choose another model."
        )


def _first(linear: nn.Linear, group: Any, x: Tensor) -> Tensor:
    return F.linear(_enter(x, group), linear.weight, linear.bias)


def _second(linear: nn.Linear, group: Any, x: Tensor) -> Tensor:
    summed = _Leave.apply(F.linear(x, linear.weight), group)
    assert isinstance(summed, Tensor)
    return summed if linear.bias is None else summed + linear.bias


def _own_heads(forward: Any, part: nn.Module, dim: int, group: Any, *inputs: Any) -> Tensor:
    whole = _enter(forward(part, *inputs), group)
    return whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def _enter(x: Tensor, group: Any) -> Tensor:
    entered = _Enter.apply(x, group)
    assert isinstance(entered, Tensor)
    return entered


class _Enter(torch.autograd.Function):
    """From what is the same on all devices to what each does with it: gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_x: Tensor) -> tuple[Tensor | None, ...]:
        total = d_x[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """The sum of what each device has, on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *d_x: Tensor) -> tuple[Tensor | None, ...]:
        return d_x[0], None
