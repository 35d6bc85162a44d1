"""Linears that stay dense beside pruned ones, in one channel group and in others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from permllm.models.families import ChannelGroup, channel_groups, linear_at
from permllm.models.selection import pruned_groups
from permllm.permutation.foldable import folded_permutations
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.wanda import Wanda
from permllm.pruning.layerwise import PrunedModel
from permllm.settings.config import NMPattern
from permllm.training.losses import cosine_loss
from tests.conftest import tiny_model
from tests.problems import PRUNERS, check_others, lcp, method, problem, pruned, states_of

PATTERN = NMPattern(6, 8)
# In the second layer one member alone is pruned of what reads the residual stream, and in the first
# one group.
KEEP_DENSE = ("layers.0.self_attn", "v_proj", "layers.1.mlp.up_proj", "k_proj")


def mixed(model: nn.Module) -> list[ChannelGroup]:
    return pruned_groups(channel_groups(model), KEEP_DENSE)


def check(model: nn.Module, found: PrunedModel, moves: bool) -> None:
    before = dict(tiny_model("llama").named_parameters())
    assert found.violations == 0
    assert len(found.masks) == 7
    group_of = {path: group.name for group in mixed(model) for path in group.members}
    for path, mask in found.masks.items():
        weight = linear_at(model, path).weight
        kept = mask[:, found.permutations[group_of[path]]].view(len(weight), -1, PATTERN.m).sum(2)
        assert bool((kept == PATTERN.n).all())
        assert not bool(weight[~mask].any())
        assert moves or torch.equal(weight, torch.where(mask, before[f"{path}.weight"], 0.0))
    check_others(model, found)


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
@pytest.mark.parametrize("permutation", [None, Heuristic("free")])
def test_some_linears_are_pruned_and_the_others_stay_as_they_were(
    pruner: str, permutation: Any
) -> None:
    model = tiny_model("llama")
    own: dict[str, Any] = {"groups": mixed(model), "pattern": PATTERN}
    found = pruned(model, method(f"pruner={pruner}"), permutation=permutation, **own)
    check(model, found, pruner == "sparsegpt")


@pytest.mark.parametrize(("constraint", "way"), [("free", "hard"), ("foldable", "swap")])
def test_what_is_learned_is_measured_as_it_is_then_pruned(constraint: Any, way: Any) -> None:
    model = tiny_model("llama")
    losses: list[float] = []
    settings = {"block_size": 16, "epochs": 3, "select_from": 3, "learning_rate": 0.05}
    learning = problem(
        model, Wanda(), PATTERN, on_epoch=lambda values: losses.append(values["measured_loss"])
    )
    learning.groups = mixed(model)
    orders = lcp(constraint=constraint, straight_through=way, **settings).permutations(learning)
    assert orders.keys() == {group.name for group in learning.groups}
    own: dict[str, Any] = {"groups": learning.groups, "pattern": PATTERN}
    check(
        model, pruned(model, Wanda(), factors=learning.factors, permutations=orders, **own), False
    )
    loss = float(cosine_loss(states_of(model), learning.target))
    assert loss == pytest.approx(min(losses), rel=1e-4)
    if constraint == "foldable":  # the residual stream, two MLPs, one attention
        assert len(folded_permutations(learning.groups, orders)) == 4


def test_a_stage_of_layers_that_stay_dense_is_passed_by() -> None:
    told: list[Any] = []
    learning = problem(pattern=PATTERN, on_epoch=told.append)
    learning.groups = pruned_groups(learning.groups, ["0"])
    orders = lcp(layers_per_stage=1, epochs=1).permutations(learning)
    assert orders.keys() == {group.name for group in learning.groups}
    assert [(values["first_layer"], values["last_layer"]) for values in told] == [(1, 1)]


@pytest.mark.parametrize("reconstruction", ["obs", "distill"])
def test_reconstruction_leaves_dense_linears_alone(reconstruction: str) -> None:
    model = tiny_model("llama")
    made = method(f"reconstruction={reconstruction}")
    more: dict[str, Any] = {"pattern": PATTERN, "reconstruction": made}
    more["groups"] = pruned_groups(channel_groups(model), ["0", "layers.1.self_attn"])
    result = pruned(model, Wanda(), permutation=Heuristic("free"), **more)
    before = tiny_model("llama")
    for path, mask in result.masks.items():
        weight = linear_at(model, path).weight
        assert not torch.equal(weight, torch.where(mask, linear_at(before, path).weight, 0.0))
        assert not bool(weight[~mask].any())
    check_others(model, result)
