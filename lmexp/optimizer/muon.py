"""Muon (Jordan et al. 2024) on hidden matrices and AdamW on the rest, as one optimizer.

The update of a matrix is its momentum M = U S V^T with the singular values set to one, U V^T: the steepest descent
under the spectral norm (Bernstein & Newhouse 2024). It is approximated by a few odd polynomials of M.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lmexp.contracts import UserError
from lmexp.optimizer.groups import (
    Matrix,
    check_betas,
    check_fused,
    check_rates,
    resolve_fused,
    set_initial_rates,
    split_parameters,
)
from lmexp.optimizer.sharding import is_in_pieces, local, pieces_like, whole_from

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""(a, b, c) of the polynomials a x + b x^3 + c x^5, to be applied in this order, that bring singular values from
[0.001, 1] to 1 the fastest (Amsel et al. 2025, "The Polar Express", algorithm 1); the last may be repeated."""

SAFETY = 1.01
"""Singular values are kept this much below the end of the interval, and each polynomial is stretched by it, for
rounding errors (section 4.4 there)."""


@dataclass(frozen=True)
class Muon:
    """Builds `MuonAdamW` over a model's parameters."""

    lr: float
    """Learning rate of the hidden matrices, before the schedule."""

    embedding_lr: float
    """AdamW's learning rate for embeddings, tied heads among them."""

    head_lr: float
    """AdamW's learning rate for an untied head."""

    vector_lr: float
    """AdamW's learning rate for norm weights, biases and gates."""

    momentum: float = 0.9
    """Rate of the average of a matrix's gradients; in [0, 1)."""

    nesterov: bool = True
    """Look one step ahead: the update is made of momentum * average + (1 - momentum) * gradient."""

    steps: int = 3
    """Polynomials applied to orthogonalise, 1 to 7; more give a truer U V^T and cost more, which did not repay at a
    width of 128."""

    scale: str = "spectral"
    """Size of a (rows, columns) update: spectral, sqrt(max(1, rows / columns)); or rms, 0.2 * sqrt(max(rows,
    columns)), the size of AdamW's (Liu et al. 2025, section 2.2), so that AdamW's rates can be kept."""

    precondition: bool = False
    """Scale the rows of an update before the polynomials, each by how much it overlaps with all, instead of all by one
    norm: singular values begin closer to 1, so that a polynomial less does nearly as well. The directions change a
    little (Prach & Lampert 2022, theorem 1, for layers; Boissin et al. 2025, "Turbo-Muon", for Muon)."""

    weight_decay: float = 0.0
    """Each step shrinks hidden matrices by lr * weight_decay; nothing else is decayed."""

    betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's rates of the averages of the gradient and of its square; each in [0, 1)."""

    eps: float = 1e-10
    """Added to AdamW's denominator."""

    fused: bool | str = "auto"
    """AdamW as one kernel for all parameters: true, false, or auto, where the device can."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_rates(
            lr=self.lr,
            embedding_lr=self.embedding_lr,
            head_lr=self.head_lr,
            vector_lr=self.vector_lr,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        check_betas(self.betas)
        check_fused(self.fused)
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum={self.momentum}; expected a number of at least 0 and less than 1.")
        if not 1 <= self.steps <= len(POLAR_EXPRESS):
            raise UserError(f"optimizer.steps={self.steps}; expected 1 to {len(POLAR_EXPRESS)}; 3 to 5 are usual.")
        if self.scale not in ("spectral", "rms"):
            raise UserError(f"optimizer.scale={self.scale}; expected spectral or rms.")

    def build(self, model: nn.Module) -> MuonAdamW:
        """The optimizer, with the groups `matrices`, `embedding`, `head`, `vectors` as far as the model has them."""
        split = split_parameters(model)
        rest = {
            "embedding": (split.embedding, self.embedding_lr),
            "head": (split.head, self.head_lr),
            "vectors": (split.vectors, self.vector_lr),
        }
        adam_parameters: list[Tensor] = [p for parameters, _ in rest.values() for p in parameters]
        fused = resolve_fused(self.fused, adam_parameters)
        groups: list[dict[str, Any]] = [
            {
                "name": "matrices",
                "params": [m.weight for m in split.matrices],
                "lr": self.lr,
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "steps": self.steps,
                "scale": self.scale,
                "precondition": self.precondition,
                "weight_decay": self.weight_decay,
            }
        ]
        groups += [
            {"name": name, "params": parameters, "lr": lr, "betas": self.betas, "eps": self.eps, "fused": fused}
            for name, (parameters, lr) in rest.items()
        ]
        optimizer = MuonAdamW([g for g in groups if g["params"]], split.matrices)
        set_initial_rates(optimizer)
        return optimizer


class MuonAdamW(torch.optim.Optimizer):
    """The group `matrices` is updated by Muon, every other by AdamW without decay.

    Matrices (and parts of fused ones) of one shape are orthogonalised as one batch. All state stands in the state
    dict as tensors and numbers, so that training resumes to the bit. Under data parallelism each device does the
    same work on the same averaged gradients; where weights are in pieces, each brings a matrix's momentum together,
    does the same, and keeps its piece.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: list[Matrix]) -> None:
        """`groups` as `Muon.build` makes them; `matrices` says how those of the first are taken apart."""
        self._parts = {m.weight: m.parts for m in matrices}
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["name"] == "matrices" else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        ahead = group["momentum"] if group["nesterov"] else 1.0  # of the way from the gradient to the average
        buckets: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        changes: list[tuple[nn.Parameter, Tensor]] = []  # of those in pieces
        for p in parameters:
            assert p.grad is not None
            goal: Tensor = p
            gradient, average = local(p.grad), local(self.state[p]["momentum"])
            if is_in_pieces(p):  # a device averages its own pieces, and sees the whole of a matrix to orthogonalise it
                average.lerp_(gradient, 1 - group["momentum"])
                # of two that are equal any mean is the same: what follows leaves it as it is
                gradient = average = whole_from(torch.lerp(gradient, average, ahead), p)
                goal = torch.zeros_like(gradient)
                changes.append((p, goal))
            for members in zip(*(self._split(p, x) for x in (goal, gradient, average)), strict=True):
                buckets.setdefault((members[0].shape[1], members[0].shape[2]), []).append(members)
        if group["weight_decay"]:
            torch._foreach_mul_([local(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])
        for (rows, columns), bucket in buckets.items():
            spectral = group["scale"] == "spectral"
            size = max(1.0, rows / columns) ** 0.5 if spectral else 0.2 * max(rows, columns) ** 0.5
            targets, gradients, averages = (list(column) for column in zip(*bucket, strict=True))
            counts = [len(target) for target in targets]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            batch = averages[0].new_empty(sum(counts), rows, columns)
            for gradient, average, update in zip(gradients, averages, batch.split(counts), strict=True):
                torch.lerp(gradient, average, ahead, out=update)
            precondition = group.get("precondition", False)  # groups of earlier checkpoints have no such key
            batch = orthogonalize(batch, group["steps"], precondition).to(targets[0].dtype)
            torch._foreach_add_(targets, list(batch.split(counts)), alpha=-group["lr"] * size)
        for p, change in changes:
            local(p).add_(local(pieces_like(change, p)))

    def _split(self, p: nn.Parameter, x: Tensor) -> list[Tensor]:
        """Views (n, rows, columns) of what is fused in a matrix, equal neighbours together."""
        parts = self._parts[p]
        if len(set(parts)) == 1:
            return [x.view(len(parts), parts[0], -1)]
        return [piece.unsqueeze(0) for piece in x.split(parts)]

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device if group["fused"] else None)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(x: Tensor, steps: int, precondition: bool = False) -> Tensor:
    """U V^T, nearly, of each matrix U S V^T of a batch (n, rows, columns); in bf16 on CUDA, else in float32.

    Each step maps x to (a + b G + c G^2) x with G = x x^T. As all of these commute, wide matrices in float32 can be
    treated through G alone, which is smaller: the next G is p G p, and x is multiplied once, by the product of all p.
    With `precondition`, row i of x is divided by the root of sum_j |G_ij| first, after which no singular value is
    above 1 (the rows are those of the shorter side).
    """
    tall = x.shape[-2] > x.shape[-1]  # then all is done from the right, on the columns
    x = x.to(torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32))
    scale: Tensor | None = None  # of the rows of x, where it is not yet in x
    if precondition:
        gram = _overlaps(x, tall)
        scale = (gram.abs().sum(-1, keepdim=True) + 1e-14).rsqrt() / SAFETY
        gram = gram * scale * scale.mT
    else:
        x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)
        gram = _overlaps(x, tall)
    if x.dtype == torch.bfloat16 or (steps > 1 and max(x.shape[-2:]) < 2 * min(x.shape[-2:])):
        if scale is not None:
            x = x * (scale.mT if tall else scale)
        for step, (a, b, c) in enumerate(_stretched(steps)):
            gram = _overlaps(x, tall) if step else gram
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, x, p, beta=a) if tall else torch.baddbmm(x, p, x, beta=a)
        return x
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(_stretched(steps)):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    assert product is not None
    if scale is not None:
        product = product * scale.mT
    return x @ product.mT if tall else product @ x


def _overlaps(x: Tensor, tall: bool) -> Tensor:
    """Of the rows of each matrix with each other, of its columns if it is tall."""
    return x.mT @ x if tall else x @ x.mT


def _stretched(steps: int) -> list[tuple[float, float, float]]:
    """The polynomials for values up to SAFETY instead of 1; the last is left as it is, so that 1 stays near 1."""
    return [
        (a / SAFETY, b / SAFETY**3, c / SAFETY**5) if step < steps - 1 else (a, b, c)
        for step, (a, b, c) in enumerate(POLAR_EXPRESS[:steps])
    ]
