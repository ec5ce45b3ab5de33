"""Rows for words that a model has never seen.

A new word begins as the mean of the pieces that it was spelled with, in every table that has a row for each token
(as in Gee et al. 2022, Fast Vocabulary Transfer). Random numbers would not do in a head: their logit is near zero
where those of trained rows may be far below, and then the new words take all the probability (Hewitt 2021,
Initializing New Word Embeddings for Pretrained Language Models). A mean's logit is the mean of its pieces' logits
(before a cap), never above the largest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmexp.contracts import UserError
from lmexp.model.layers import Head


def vocabulary_parameters(model: nn.Module) -> set[str]:
    """Names in the state dict of the parameters that have a row for each token.

    These are the weight and the bias of every `Head`, and the weight of every embedding whose name ends in `embed`
    (`embed`, `decoder_embed`) or that is in a list whose name ends in `embeds` (`value_embeds`). The number of rows
    decides nothing: a table of positions may have as many.
    """
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Head):
            found |= {f"{name}.weight"} | ({f"{name}.bias"} if module.bias is not None else set())
        elif isinstance(module, nn.Embedding):
            parts = name.split(".")
            if parts[-1].endswith("embed") or (len(parts) > 1 and parts[-2].endswith("embeds")):
                found.add(f"{name}.weight")
    return found


@torch.no_grad()
def grow_vocabulary(
    weights: Mapping[str, Tensor], model: Any, pieces: Sequence[Sequence[int]], first_new: int
) -> dict[str, Tensor]:
    """The state dict `weights` of a model with fewer token ids, as one that `model` loads strictly.

    `pieces[n]` are the old ids that the new id `first_new + n` was spelled with; ids below `first_new` keep their rows
    bit by bit. A new id without pieces (a special token) gets the mean of all old rows (Hewitt 2021). Rows of
    padding (`vocab_multiple`) that `weights` has and no new id takes are kept, and those that come to it get the mean
    of all old rows too, as they are in the softmax. What has no row for each token is returned as it is.

    Raises `UserError` if `weights` do not belong to a smaller vocabulary of the same model.
    """
    end, own, vocabulary = first_new + len(pieces), model.state_dict(), vocabulary_parameters(model)
    assert first_new > 0, "means of no rows"
    assert end <= model.vocab_size, f"{end} token ids, the model has {model.vocab_size}"
    assert all(0 <= i < first_new for ids in pieces for i in ids), "a piece is no old id"
    grown = {}
    for name, old in weights.items():
        if name not in own:
            raise UserError(f"The weights have {name}, which the model has not; expected weights of the same model.")
        new = own[name]
        grows = name in vocabulary
        fits = old.shape == new.shape
        if grows:
            fits = old.shape[1:] == new.shape[1:] and first_new <= old.shape[0] <= new.shape[0]
        if not fits:
            expected = f"{first_new} to {new.shape[0]} rows of {tuple(new.shape[1:])}" if grows else tuple(new.shape)
            raise UserError(
                f"{name} is {tuple(old.shape)} in the weights; expected {expected}. Set the model's options as they "
                "were in the run that the weights are from; only the vocabulary may be larger."
            )
        grown[name] = _with_new_rows(old, new.shape[0], pieces, first_new) if grows else old
    return grown


def _with_new_rows(old: Tensor, n_rows: int, pieces: Sequence[Sequence[int]], first_new: int) -> Tensor:
    """(n_rows, ...) of old (rows, ...): its rows, then the means; summed in float64, so that they round once."""
    everything = old[:first_new].mean(0, dtype=torch.float64).to(old.dtype)
    grown = everything.expand(n_rows, *old.shape[1:]).clone()
    grown[: old.shape[0]] = old
    for row, ids in enumerate(pieces, first_new):
        grown[row] = old[list(ids)].double().mean(0) if len(ids) else everything
    return grown
