"""Low-rank adapters: W x + (alpha / rank) B A x, of which A and B alone are trained (Hu et al. 2022, section 4.1), by
the library peft."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmexp.contracts import UserError

_ADAPTER = "default"  # peft's name for an only one


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and what kind."""

    rank: int = 8
    """Columns of A^T and B, at least 1."""

    alpha: int = 16
    """The adapters' output is scaled by alpha / rank; above 0."""

    dropout: float = 0.0
    """Share of the adapters' inputs dropped in training; in [0, 1)."""

    targets: Sequence[str] | None = None
    """Names of linear layers, whole or their last part, or patterns of these; None: all inside the numbered blocks."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"task.lora.rank={self.rank}; expected a whole number of at least 1, such as 8.")
        if self.alpha <= 0:
            raise UserError(f"task.lora.alpha={self.alpha}; expected a number above 0, such as 16.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"task.lora.dropout={self.dropout}; expected a share of at least 0 and less than 1.")

    @property
    def scale(self) -> float:
        """Of what the adapters add."""
        return self.alpha / self.rank

    @staticmethod
    def of(settings: Mapping[str, Any]) -> LoRA:
        """From a configuration; `UserError` for keys that there are not."""
        known = LoRA.__dataclass_fields__
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise UserError(f"task.lora.{unknown[0]}: there is no such key; expected some of {', '.join(known)}.")
        return LoRA(**settings)


def add_lora(model: nn.Module, lora: LoRA, seed: int) -> None:
    """Put adapters into a model, in place: A random by `seed`, B zero, so that at first nothing changes. All else is
    frozen. The names of what had `X.weight` become `X.base_layer.weight`.

    Raises `UserError` for targets that the model has not, and where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("task.lora needs the package peft: pip install 'lmexp[peft]'.") from error
    names = _targets(model, lora.targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)


def _targets(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers to adapt."""
    modules = model.named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear) and name.split(".")[0] != "head"]
    inside = [name for name in linear if any(part.isdigit() for part in name.split("."))]
    if not inside:
        raise UserError(f"task.lora: {type(model).__name__} has no linear layers in blocks to adapt; leave it out.")
    if wanted is None:
        return inside
    found: list[str] = []
    for pattern in wanted:
        fitting = [n for n in linear if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n.split(".")[-1], pattern)]
        if not fitting:
            last = ", ".join(sorted({name.split(".")[-1] for name in inside}))
            raise UserError(
                f"task.lora.targets={pattern}: {type(model).__name__} has no such linear layer; expected a full name "
                f"or one of {last}."
            )
        found += [name for name in fitting if name not in found]
    return found


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of a model with adapters as that of the plain one: W + scale B A in float32 at least."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, base, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if base and rest == "weight":
            a, b = (state[f"{layer}.lora_{x}.{_ADAPTER}.weight"] for x in "AB")
            wide = torch.promote_types(value.dtype, torch.float32)
            value = (value.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(value.dtype)
        plain[f"{layer}.{rest}" if base else name] = value
    return plain
