"""Models whose weights are in pieces on several devices (torch's DTensor, FSDP2), and whole ones, treated alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint


def local(x: Tensor) -> Tensor:
    """This device's piece, sharing its memory; a whole tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_in_pieces(x: Tensor) -> bool:
    """Whether this device has a piece of it only."""
    return isinstance(x, DTensor)


def whole_from(piece: Tensor, like: Tensor) -> Tensor:
    """All of what each device has a piece of, as it has of `like`. Collective."""
    if not isinstance(like, DTensor):
        return piece
    mesh, placements = like.device_mesh, like.placements
    there = DTensor.from_local(piece, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return there.full_tensor()


def whole(x: Tensor) -> Tensor:
    """All of it, on every device. Collective where it is in pieces."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def pieces_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every device, in pieces as `like` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return x
    mesh = like.device_mesh
    spread = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(mesh, like.placements)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm () of all numbers together. Collective where they are in pieces."""
    return whole(nn.utils.get_total_norm([t.detach() for t in tensors], foreach=True))


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
    """Keep a piece of the weights on each device of a mesh; a block's are brought together while it works (FSDP2,
    Zhao et al. 2023). The rest, embeddings, head and norms, are one more group, whole from the forward to the backward
    pass, as the head is asked outside the model's forward."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


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
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with its tensors whole, on the CPU where they were in pieces. Collective."""
    return {name: x.full_tensor().cpu() if isinstance(x, DTensor) else x for name, x in state.items()}
