"""Families, pruners and permutations through calibration, learning and pruning."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.models.families import FAMILIES, channel_groups, linear_at
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.sparsegpt import SparseGPT
from permllm.pruner.wanda import Wanda
from permllm.pruning.phases import calibrate_dense
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import saliency
from tests.conftest import tiny_model
from tests.problems import PATTERN, PRUNERS, check_others, lcp, method, problem, pruned, tokens

# Every pruner with every permutation on one family, and each other family with one of each.
COMBINATIONS = [*itertools.product(["llama"], PRUNERS, ["none", "heuristic", "lcp"])]
OTHERS = sorted(FAMILIES.keys() - {"llama"})
COMBINATIONS += zip(OTHERS, itertools.cycle(PRUNERS), itertools.cycle(["heuristic", "none"]))


@pytest.mark.parametrize(("family", "pruner_name", "permutation"), COMBINATIONS)
@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_every_combination_is_weight_times_mask_and_n_m_in_permuted_order(
    family: str, pruner_name: str, permutation: str, statistics: str
) -> None:
    model = tiny_model(family)
    dense_model = copy.deepcopy(model)
    pruner = method(f"pruner={pruner_name}")
    groups = channel_groups(model)
    learning = problem(model, pruner)
    made: Any = {"none": None, "heuristic": Heuristic("free"), "lcp": lcp(epochs=1)}
    permuting = made[permutation]
    factors = learning.factors if statistics == "dense" else None
    orders = None
    if permuting is not None and (statistics == "dense" or permutation == "lcp"):
        orders = permuting.permutations(learning)
    result = pruned(model, pruner, permuting, factors=factors, permutations=orders)
    assert result.violations == 0
    for group in groups:
        perm = result.permutations[group.name]
        assert sorted(perm.tolist()) == list(range(group.channels))
        for path in group.members:
            weight, mask = linear_at(model, path).weight, result.masks[path]
            kept = (weight[:, perm] != 0).unflatten(1, (-1, 4)).sum(-1)
            assert kept.max() <= 2
            assert not torch.signbit(weight[~mask]).any()
            assert not weight[~mask].any()
            if pruner_name != "sparsegpt":
                dense = linear_at(dense_model, path).weight
                assert torch.equal(weight, torch.where(mask, dense, 0.0))
    check_others(model, result, dense_model)
    assert all(0 < value <= 1 for value in result.retained.values())
    assert all(value > 0 for value in result.output_error.values())


def test_output_error_is_the_relative_squared_error_on_the_dense_inputs() -> None:
    model = tiny_model("opt")  # with biases
    dense_model = copy.deepcopy(model)
    groups = channel_groups(model)
    captured: dict[object, Tensor] = {}

    def note(linear: object, args: tuple[Tensor]) -> None:
        captured[linear] = args[0].flatten(0, -2).double()

    for path in (path for group in groups for path in group.members):
        linear_at(dense_model, path).register_forward_pre_hook(note)
    dense_model(input_ids=tokens())
    result = pruned(model, Wanda(), permutation=Heuristic("free"))
    for group in groups:
        error = norm = 0.0
        for path in group.members:
            linears = (linear_at(dense_model, path), linear_at(model, path))
            x, (dense, sparse) = captured[linears[0]], (one.weight.double() for one in linears)
            error += float((x @ (dense - sparse).T).square().sum())
            norm += float((x @ dense.T).square().sum())
        assert result.output_error[group.name] == pytest.approx(error / norm, rel=1e-4)


def test_sequential_statistics_come_from_the_pruned_layers_before() -> None:
    model = tiny_model("llama")
    groups = channel_groups(model)
    dense_factors = calibrate_dense(model, groups, tokens(), Wanda(), 4).factors
    result = pruned(model, Wanda())
    second = [group for group in groups if group.layer == 1]
    path = second[0].members[0]
    fresh = tiny_model("llama")
    # The same model with its first layer pruned, everything recomputed by hand.
    for group in groups:
        if group.layer == 0:
            for member in group.members:
                linear_at(fresh, member).weight.data *= result.masks[member]
    by_hand = calibrate_dense(fresh, groups, tokens(), Wanda(), 4).factors[path]
    assert not torch.allclose(by_hand.column, dense_factors[path].column)
    weight = linear_at(fresh, path).weight
    assert torch.equal(
        result.masks[path], permuted_nm_mask(saliency(weight, by_hand), torch.arange(32), PATTERN)
    )


def test_streams_multiply_in_the_format_that_is_asked_for_and_updates_do_not() -> None:
    model, last, columns = tiny_model("llama"), "model.layers.1.mlp.down_proj", []
    for dtype in (None, torch.bfloat16):
        pruner = SparseGPT(0.01)
        dense = calibrate_dense(model, channel_groups(model), tokens(), pruner, 4, dtype)
        result = pruned(copy.deepcopy(model), pruner, factors=dense.factors, products=dtype)
        assert result.violations == 0
        columns.append(dense.factors[last].column)
    assert not torch.equal(*columns)
    torch.testing.assert_close(*columns, rtol=0.2, atol=0)


def test_violations_are_counted() -> None:
    model = tiny_model("llama")
    groups = channel_groups(model)
    paths = [path for group in groups for path in group.members]
    dense = {path: torch.ones_like(linear_at(model, path).weight).bool() for path in paths}
    identity = {group.name: torch.arange(group.channels) for group in groups}
    factors = problem().factors
    result = pruned(model, Wanda(), masks=dense, permutations=identity, factors=factors)
    assert result.violations == sum(mask.numel() // 4 for mask in dense.values())


def test_the_measures_of_a_group_are_those_of_the_formulas() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    learning = problem(model)
    scores = {
        path: learning.saliency_of(path).clone()
        for group in learning.groups
        for path in group.members
    }
    result = pruned(model, Wanda(), Heuristic("free"), factors=learning.factors)
    for group in learning.groups:
        channels = result.permutations[group.name].tolist()
        moved = sum(channel != place for place, channel in enumerate(channels))
        assert result.moved[group.name] == pytest.approx(moved / group.channels)
        kept = sum(float(scores[path][result.masks[path]].sum()) for path in group.members)
        whole = sum(float(scores[path].sum()) for path in group.members)
        assert result.retained[group.name] == pytest.approx(kept / whole, rel=1e-9)
