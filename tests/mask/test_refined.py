"""Refined masks: N:M, of a lower output error that no swap within a group lowers further."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.mask.refined import RefinedMask, refined_mask
from permllm.models.families import linear_at
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.wanda import Wanda
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import nm_mask
from tests.conftest import tiny_model
from tests.mask.test_mask import ordered, pruners
from tests.permutation.test_keep_dense import PATTERN, check, mixed
from tests.problems import check_masks, problem, pruned, random, same, tokens


def errors(weight: Tensor, keep: Tensor, inputs: Tensor) -> Tensor:
    """Return the squared error of each row of the output, from the outputs themselves."""
    return (inputs @ torch.where(keep, weight, 0.0).t() - inputs @ weight.t()).square().sum(0)


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(6, 8)])
def test_no_swap_within_a_group_is_left_that_lowers_the_error(pattern: NMPattern) -> None:
    # More channels than the products follow at once, and inputs that belong together.
    weight, inputs = random(3, 72), random(200, 72, seed=1) @ random(72, 72, seed=2) + 0.5
    start = nm_mask(weight.abs() * inputs.norm(dim=0), pattern)
    gram = inputs.t() @ inputs
    found = refined_mask(weight, start, gram, pattern, 100)
    before, after = errors(weight, start, inputs), errors(weight, found, inputs)
    assert (found.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    assert (after < before).all()
    assert after.sum() < 0.95 * before.sum()
    for row, first in itertools.product(range(3), range(0, 72, pattern.m)):
        places = range(first, first + pattern.m)
        for out, into in itertools.product(places, places):
            if found[row, out] and not found[row, into]:
                other = found[row : row + 1].clone()
                other[0, out], other[0, into] = False, True
                assert errors(weight[row : row + 1], other, inputs) >= after[row] * (1 - 1e-9)
    # What is the best already stays, and fewer sweeps are between.
    best = found.clone()
    assert torch.equal(refined_mask(weight, found, gram, pattern, 1), best)
    assert torch.equal(found, best)  # what is given stays as it is
    once = errors(weight, refined_mask(weight, start, gram, pattern, 1), inputs)
    assert (once <= before * (1 + 1e-12)).all()
    assert after.sum() <= once.sum()


@pytest.mark.parametrize("permutation", ["none", "heuristic"])
def test_masks_of_a_model_have_a_lower_output_error_and_are_nm_in_the_order(
    permutation: str,
) -> None:
    def found(refined: bool) -> Any:
        model = tiny_model("llama")
        learning = problem(model)
        orders = ordered(learning, permutation)
        masks = RefinedMask().masks(learning, orders) if refined else pruners(learning, orders)
        check_masks(learning.groups, orders, masks)
        return pruned(model, Wanda(), factors=learning.factors, permutations=orders, masks=masks)

    plain, better = found(refined=False), found(refined=True)
    assert better.violations == 0
    # That of the first layer, whose inputs are those of the dense model in both.
    for name in (name for name in plain.output_error if ".0." in name):
        assert better.output_error[name] < 0.95 * plain.output_error[name]
        assert better.retained[name] < plain.retained[name]


def test_only_the_calibration_samples_are_read_and_groups_are_refined_alone_alike() -> None:
    learning = problem(calibration=tokens()[:4])
    orders = ordered(learning, "none")
    masks = RefinedMask().masks(learning, orders)
    learning.tokens = learning.tokens[:4]
    learning.groups = learning.groups[:1]
    alone = RefinedMask().masks(learning, orders)
    assert set(alone) == set(learning.groups[0].members)
    assert same(alone, masks)
    assert all(linear_at(learning.model, path).weight.all() for path in masks)  # dense still


def test_dense_layers_and_members_in_orders_that_fold() -> None:
    model = tiny_model("llama")
    learning = problem(model, pattern=PATTERN)
    learning.groups = mixed(model)
    orders = Heuristic("foldable").permutations(learning)
    masks = RefinedMask().masks(learning, orders)
    own: dict[str, Any] = {"groups": learning.groups, "pattern": PATTERN}
    check(
        model,
        pruned(model, Wanda(), factors=learning.factors, permutations=orders, masks=masks, **own),
        False,
    )
