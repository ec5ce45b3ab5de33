"""AdamW (Loshchilov & Hutter 2019, algorithm 2): torch's, with weight decay on matrices only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmexp.contracts import UserError
from lmexp.optimizer.groups import (
    check_betas,
    check_fused,
    check_rates,
    layer_factors,
    resolve_fused,
    set_initial_rates,
    split_parameters,
)


@dataclass(frozen=True)
class AdamW:
    """Builds torch's AdamW over a model's parameters."""

    lr: float
    """Learning rate of all parameters, before the schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Rates of the averages of the gradient and of its square; each in [0, 1)."""

    eps: float = 1e-8
    """Added to the denominator."""

    weight_decay: float = 0.1
    """Each step shrinks matrices and embeddings by lr * weight_decay; vectors are not decayed."""

    layer_decay: float = 1.0
    """A layer's rate is this times that of the layer above it, the top layer's this times the head's; in (0, 1] (Clark
    et al. 2020, ELECTRA, table 7: 0.8)."""

    fused: bool | str = "auto"
    """One kernel for all parameters: true, false, or auto, where the device can."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_rates(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        check_betas(self.betas)
        check_fused(self.fused)
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay={self.layer_decay}; expected a factor above 0 and at most 1.")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, with the groups `embedding`, `head`, `matrices`, `vectors` as far as the model has them;
        with `layer_decay`, one of each for every layer."""
        split = split_parameters(model)
        members = {
            "embedding": split.embedding,
            "head": split.head,
            "matrices": [m.weight for m in split.matrices],
            "vectors": split.vectors,
        }
        factors = layer_factors(model, self.layer_decay)
        groups: list[dict[str, Any]] = []
        for name, parameters in members.items():
            for factor in sorted({factors[p] for p in parameters}, reverse=True):
                of_layer = [p for p in parameters if factors[p] == factor]
                decay = 0.0 if name == "vectors" else self.weight_decay
                full = name if factor == 1 else f"{name}_x{factor:.3g}"
                groups.append({"name": full, "params": of_layer, "weight_decay": decay, "lr": self.lr * factor})
        groups.sort(key=lambda group: -group["lr"])  # the first is the one whose rate is told as that of all
        everything: list[torch.Tensor] = [p for parameters in members.values() for p in parameters]
        fused = resolve_fused(self.fused, everything)
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused
        )
        set_initial_rates(optimizer)
        return optimizer
