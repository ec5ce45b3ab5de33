"""Rates of layers, and what is frozen, against a count by hand."""

from __future__ import annotations

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.model.bert import BertConfig
from lmexp.model.transformer import TransformerConfig
from lmexp.optimizer.adamw import AdamW
from lmexp.task.base import freeze_parts


def rates(model, optimizer) -> dict[str, float]:
    of = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[p] for name, p in model.named_parameters()}


def test_each_layer_learns_slower_than_the_one_above() -> None:
    model = BertConfig(n_layers=3, n_heads=2, d_model=8, max_length=16).build(20)
    found = rates(model, AdamW(lr=1.0, layer_decay=0.5).build(model))
    assert found["head.transform.dense.weight"] == 1.0
    assert [found[f"blocks.{n}.mlp.contract.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert [found[f"blocks.{n}.norm1.bias"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert found["embed.weight"] == found["position.weight"] == 0.0625
    both = TransformerConfig(n_layers=2, n_decoder_layers=1, n_heads=2, d_model=8, max_length=16).build(20)
    found = rates(both, AdamW(lr=1.0, layer_decay=0.5).build(both))
    stacks = {name.rsplit(".", 4)[0].split(".")[0] for name in found if ".attention." in name}
    assert stacks == {"encoder", "decoder"}, "each stack counts its own layers"
    assert found["encoder.blocks.1.attention.qkv.weight"] == found["decoder.blocks.0.attention.qkv.weight"] == 0.5
    assert found["embed.weight"] == 0.125


def test_without_decay_nothing_changes() -> None:
    model = BertConfig(n_layers=2, n_heads=2, d_model=8, max_length=16).build(20)
    optimizer = AdamW(lr=1.0).build(model)
    assert [group["name"] for group in optimizer.param_groups] == ["embedding", "matrices", "vectors"]
    assert set(rates(model, optimizer).values()) == {1.0}


def test_frozen_parts_by_name_and_pattern() -> None:
    model = BertConfig(n_layers=3, n_heads=2, d_model=8, max_length=16).build(20)
    freeze_parts(model, ["embed", "blocks.[0-1]"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("embed.", "blocks.0.", "blocks.1."))}
    trained = {p for group in AdamW(lr=1.0).build(model).param_groups for p in group["params"]}
    assert trained == {p for p in model.parameters() if p.requires_grad}
    with pytest.raises(UserError, match=r"task.freeze=layers: Bert has no such part"):
        freeze_parts(model, ["layers"])
    assert isinstance(next(iter(trained)), torch.nn.Parameter)
