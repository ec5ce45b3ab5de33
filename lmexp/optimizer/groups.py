"""Which parameter is treated how: hidden matrices, embeddings, the head, vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lmexp.contracts import UserError
from lmexp.optimizer.sharding import whole_shape

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
"""A parameter of a numbered module: the name of all of these, and its number."""


@dataclass
class Matrix:
    """A hidden matrix and how it is taken apart."""

    weight: nn.Parameter
    """(rows, columns)."""

    parts: tuple[int, ...]
    """Rows of each of the projections that are fused in it; (rows,) for a plain one."""


@dataclass
class ParameterGroups:
    """Each parameter of a model that has gradients, once, a shared one where it comes first in this order."""

    embedding: list[nn.Parameter] = field(default_factory=list)
    """Tables that are looked up (`nn.Embedding`), tied heads among them."""

    head: list[nn.Parameter] = field(default_factory=list)
    """Untied matrices of the module `head` itself, not of what is inside it."""

    matrices: list[Matrix] = field(default_factory=list)
    """All other parameters of two dimensions."""

    vectors: list[nn.Parameter] = field(default_factory=list)
    """Norm weights, biases, gates."""


def split_parameters(model: nn.Module) -> ParameterGroups:
    """Sort the parameters of a model by their use; a module's attribute `parts` says how its weight is fused."""
    groups = ParameterGroups()
    seen: set[nn.Parameter] = set()
    modules = dict(model.named_modules())
    for wanted in ("embedding", "rest"):
        for module_name, module in modules.items():
            if (wanted == "embedding") != isinstance(module, nn.Embedding):
                continue
            for name, p in module.named_parameters(recurse=False):
                if p in seen or not p.requires_grad:
                    continue
                seen.add(p)
                if wanted == "embedding":
                    groups.embedding.append(p)
                elif p.dim() < 2:
                    groups.vectors.append(p)
                elif module_name.split(".")[-1] == "head":
                    groups.head.append(p)
                else:
                    assert p.dim() == 2, f"{module_name}.{name} has {p.dim()} dimensions, matrices have two"
                    rows = whole_shape(p)[0]
                    parts = getattr(module, "parts", (rows,)) if name == "weight" else (rows,)
                    assert sum(parts) == rows, f"the parts of {module_name} are not its rows"
                    groups.matrices.append(Matrix(p, tuple(parts)))
    return groups


def layer_factors(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """What each parameter's rate is multiplied with: layer n of L (n + 1 of L numbered modules of one name, such as
    `blocks.n`) decay^(L - n), embeddings decay^(L + 1) for the deepest L, all others 1."""
    layers: dict[str, int] = {}
    for name, _ in model.named_parameters():
        if found := _LAYER.match(name):
            layers[found[1]] = max(layers.get(found[1], 0), int(found[2]) + 1)
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    factors = {}
    for name, p in model.named_parameters():
        found = _LAYER.match(name)
        if p in tables:
            factors[p] = decay ** (max(layers.values(), default=0) + 1)
        elif found:
            factors[p] = decay ** (layers[found[1]] - int(found[2]))
        else:
            factors[p] = 1.0
    return factors


def can_fuse(parameters: list[Tensor]) -> bool:
    """Whether torch's fused AdamW runs on these parameters."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)


def resolve_fused(fused: bool | str, parameters: list[Tensor]) -> bool:
    """The option `fused`: "auto" where it can be, True or False as said; raises `UserError` for True that cannot be."""
    possible = can_fuse(parameters)
    if fused is True and not possible:
        kinds = sorted({f"{p.dtype} on {p.device.type}" for p in parameters})
        raise UserError(f"optimizer.fused=true does not work for {', '.join(kinds)}; use optimizer.fused=auto.")
    return possible if fused == "auto" else bool(fused)


def check_betas(betas: tuple[float, float]) -> None:
    """Raise `UserError` unless both rates of AdamW's averages are in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={list(betas)}; expected two numbers of at least 0 and less than 1.")


def check_rates(**values: float) -> None:
    """Raise `UserError` for the first negative rate."""
    for name, value in values.items():
        if not (value >= 0 and value < float("inf")):
            raise UserError(f"optimizer.{name}={value}; expected a number of at least 0.")


def check_fused(fused: bool | str) -> None:
    """Raise `UserError` unless `fused` is true, false or auto."""
    if fused not in (True, False, "auto"):
        raise UserError(f"optimizer.fused={fused}; expected true, false or auto.")


def set_initial_rates(optimizer: torch.optim.Optimizer) -> None:
    """Note each group's rate as `initial_lr`, which a schedule multiplies."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
