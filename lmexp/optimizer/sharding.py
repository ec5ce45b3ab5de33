"""Models whose weights are in pieces on several devices (torch's DTensor, FSDP2; shared out by `tensor_parallel`), and
whole ones, treated alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

from lmexp.optimizer.tensor_parallel import Share, TensorParallel, share_of


def local(x: Tensor) -> Tensor:
    """This device's piece, sharing its memory; a whole tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_in_pieces(x: Tensor) -> bool:
    """Whether this device has a piece of it only."""
    return isinstance(x, DTensor)


def whole_from(piece: Tensor, like: Tensor) -> Tensor:
    """All of what each device has a piece of, as it has of the parameter `like`. Collective."""
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        there = DTensor.from_local(piece, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
        piece = there.full_tensor()
    share = share_of(like)
    return piece if share is None else share.whole(piece)


def pieces_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every device, in pieces as the parameter `like` is. Nothing is sent."""
    share = share_of(like)
    if share is not None:
        x = share.piece(x)
    if not isinstance(like, DTensor):
        return x
    mesh = like.device_mesh
    spread = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(mesh, like.placements)


def whole_shape(p: Tensor) -> torch.Size:
    """The shape of all of a parameter."""
    share = share_of(p)
    if share is None:
        return p.shape
    return torch.Size([*p.shape[: share.dim], sum(share.spans), *p.shape[share.dim + 1 :]])


def norm_of(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """The Euclidean norm () of all numbers together. Collective where they are in pieces. `like`: the parameters that
    they belong to, if they are none themselves."""
    shares = [share_of(p) for p in (tensors if like is None else like)]
    group = next((share.group for share in shares if share is not None), None)
    if group is None:
        return _norm(tensors)
    square = _norm([t for t, share in zip(tensors, shares, strict=True) if share is not None]).square()
    if rest := [t for t, share in zip(tensors, shares, strict=True) if share is None]:
        square += _norm(rest).square() / dist.get_world_size(group)
    dist.all_reduce(square, group=group)  # of all, so that it is the same to the bit on all
    return square.sqrt()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm([t.detach() for t in tensors], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a number ()."""
    torch._foreach_mul_([local(t) for t in tensors], factor)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, in its own order."""
    found = []
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
            found += list(part)
    return found


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep a piece of the weights on each device of the mesh `data_parallel`, after sharing blocks out over the mesh
    `tensor_parallel`, if that has several; a block's pieces are brought together while it works (FSDP2, Zhao et al.
    2023). The rest, embeddings, head and norms, are one more group, whole from the forward to the backward pass, as the
    head is asked outside the model's forward."""
    blocks = blocks_of(model)
    across = mesh["tensor_parallel"]
    parallel = TensorParallel(model, blocks, across.get_group()) if across.size() > 1 else None
    for block in blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    if parallel is not None:
        parallel.mark()
        model.tensor_parallel = parallel  # type: ignore[assignment]


def recompute_activations(model: nn.Module) -> None:
    """Keep of each block its input alone, and compute the rest again in the backward pass (Chen et al. 2016)."""
    for block in blocks_of(model):
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Any, *inputs: Any, **others: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **others)
    return checkpoint(forward, *inputs, use_reentrant=False, **others)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights whole on every device inside, so that each can use the model as often as it likes. Collective."""
    units = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    parallel: Any = getattr(model, "tensor_parallel", None)
    try:
        with nullcontext() if parallel is None else parallel.united():
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def whole_state(state: Mapping[str, Any], like: Mapping[str, Share | None]) -> dict[str, Any]:
    """A state dict with its tensors whole, on the CPU where they were in pieces; `like`: how those of a name are shared
    out. Collective."""

    def whole(x: DTensor, share: Share | None) -> Tensor:
        full = x.full_tensor()
        return (full if share is None else share.whole(full)).cpu()

    return {name: whole(x, like.get(name)) if isinstance(x, DTensor) else x for name, x in state.items()}


def shares_of(module: nn.Module) -> dict[str, Share | None]:
    """How the parameters of a module are shared out, by all of their names."""
    return {name: share_of(p) for name, p in module.named_parameters(remove_duplicate=False)}
