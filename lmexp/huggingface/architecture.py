"""What each Hugging Face architecture says about itself, and the exchange of weights by its rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmexp.contracts import UserError


@dataclass(frozen=True)
class Rule:
    """One parameter of ours and the parameters of theirs that hold the same numbers."""

    ours: str
    """Its name in our state dict."""

    theirs: tuple[str, ...]
    """Their names; several stand one after the other along the first dimension of ours (fused projections)."""

    rows: tuple[int, ...] = ()
    """Rows of ours for each of theirs; none: all the same."""

    transpose: bool = False
    """Theirs are (in, out), as in GPT-2's Conv1D; of a vector (n,) of ours, a row (1, n)."""

    offset: int = 0
    """Ours are their rows from here on (positions that begin at a padding index)."""

    vocabulary: bool = False
    """Rows are tokens: ours may have more, padding of the vocabulary, which start at zero and are not exported."""

    optional: bool = False
    """Files may leave it out, for a copy of another parameter or a head that was never trained."""


class Architecture(ABC):
    """One `model_type` of Transformers."""

    model_type: str
    """The `model_type` of their config.json."""

    padding_id: int | None = None
    """The id that their network takes for padding wherever it stands; None: none. A tokenizer whose text has that id
    cannot be exported with it."""

    computed: tuple[str, ...] = (".position_ids",)
    """How names in their files end that hold no weights: tables which both sides compute."""

    @abstractmethod
    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our model node, `_target_` and its keys, for their config.json (a full one, as `to_dict` gives it).

        Raises `UserError` for an option that our family does not have.
        """
        ...

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether this is the architecture to export our model as."""
        ...

    @abstractmethod
    def config(self, model: Any, vocab_size: int) -> dict[str, Any]:
        """Their config.json for our model, with `model_type` and `architectures`. Raises `UserError` for an option
        of ours that they do not have."""
        ...

    @abstractmethod
    def rules(self, model: Any) -> Sequence[Rule]:
        """How each parameter of our model stands in theirs; shared ones (tied heads) once."""
        ...


@dataclass(frozen=True)
class Imported:
    """What became of a file's weights."""

    weights: dict[str, Tensor]
    """By our names."""

    new: list[str]
    """Ours that the file does not have; they keep their initial values."""

    unused: list[str]
    """The file's that our model has no place for."""


def to_ours(
    architecture: Architecture, model: nn.Module, state: Mapping[str, Tensor], vocab_size: int | None = None
) -> Imported:
    """Their state dict as ours. Names may lack the prefix of the base model or have it (`transformer.`, `bert.`).

    `vocab_size`: how many tokens there are, if that is known; then rows of theirs beyond it, which pad their
    vocabulary, are left out. Our own padding is zero. Raises `UserError` for shapes that do not fit.
    """
    own = model.state_dict()
    names = _without_prefix(state)
    used: set[str] = set()
    weights: dict[str, Tensor] = {}
    new: list[str] = []
    for rule in architecture.rules(model):
        if rule.ours.startswith("head.") and rule.ours not in own:  # a classifier has no head over the vocabulary
            continue
        found = [names.get(_bare(name)) for name in rule.theirs]
        if any(name is None for name in found):
            new.append(rule.ours)
            continue
        parts = [state[name] for name in found if name is not None]
        used.update(name for name in found if name is not None)
        parts = [part.T if rule.transpose else part for part in parts]
        target = own[rule.ours]
        if len(parts) > 1 and tuple(part.shape[0] for part in parts) != _rows(rule, target.shape[0]):
            raise UserError(
                f"{' + '.join(rule.theirs)} have {' + '.join(str(part.shape[0]) for part in parts)} rows; expected "
                f"{' + '.join(str(n) for n in _rows(rule, target.shape[0]))}, as this configuration has."
            )
        value = torch.cat(parts)[rule.offset :]
        if rule.transpose and target.dim() == 1:
            value = value.squeeze(-1)
        if rule.vocabulary:
            value = _rows_of_tokens(value, target.shape[0], vocab_size)
        if value.shape != target.shape:
            raise UserError(
                f"{' + '.join(rule.theirs)} gives {tuple(value.shape)} for {rule.ours}, which is "
                f"{tuple(target.shape)} in our model; expected weights that belong to this configuration."
            )
        weights[rule.ours] = value.to(target.dtype).contiguous()
    new = [name for name in new if name not in weights]  # a copy may be missing where another gave it
    return Imported(weights, new, sorted(set(state) - used))


def _rows(rule: Rule, total: int) -> tuple[int, ...]:
    """How many of the rows of ours each of theirs has."""
    return rule.rows or (total // len(rule.theirs),) * len(rule.theirs)


def _rows_of_tokens(theirs: Tensor, rows: int, vocab_size: int | None) -> Tensor:
    """A matrix with a row for each token, with theirs of tokens only, and zeros up to the `rows` of ours."""
    known = theirs[:vocab_size]
    return torch.cat((known, known.new_zeros(max(0, rows - known.shape[0]), *known.shape[1:])))


def to_theirs(architecture: Architecture, model: nn.Module, vocab_size: int) -> dict[str, Tensor]:
    """Our weights under their names."""
    own = model.state_dict()
    result: dict[str, Tensor] = {}
    for rule in architecture.rules(model):
        value = own[rule.ours].detach()
        if rule.vocabulary:
            value = value[:vocab_size]
        if rule.offset:
            value = torch.cat((value.new_zeros(rule.offset, *value.shape[1:]), value))
        parts = value.split(_rows(rule, value.shape[0]))
        for name, part in zip(rule.theirs, parts, strict=True):
            if rule.transpose:
                part = part[None] if part.dim() == 1 else part.T
            result[name] = part.contiguous().clone()
    return result


_PREFIXES = ("transformer.", "model.", "bert.", "roberta.")
"""What the base model is called inside the one with a head; files of base models lack it."""


def _bare(name: str) -> str:
    # the spelling of files of 2018 and 2019, bert-base-uncased among them
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {_bare(name): name for name in state}
