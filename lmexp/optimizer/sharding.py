"""Tensors that are in pieces on several devices (torch's DTensor, FSDP2), and whole ones, treated alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def local(x: Tensor) -> Tensor:
    """This device's piece, sharing its memory; a whole tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


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
