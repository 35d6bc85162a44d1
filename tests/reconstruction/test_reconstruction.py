"""Reconstructions lower the error and keep the masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.models.families import linear_at
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.wanda import Wanda
from permllm.pruning.layerwise import PrunedModel
from permllm.reconstruction.admm import ADMM
from permllm.reconstruction.base import PrunedLinear
from permllm.reconstruction.obs import OBS
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.statistics import Gram, InputStatistics
from tests.conftest import tiny_model
from tests.problems import PATTERN, method, problem, pruned, random, shuffled, states_of
from tests.pruner.test_sparsegpt import reference_update


def reconstructed(
    reconstruction: Any, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, PrunedModel, Tensor]:
    model = tiny_model("llama", dtype=dtype)
    learning = problem(model)
    more = {"factors": learning.factors, "reconstruction": reconstruction}
    return model, pruned(model, Wanda(), Heuristic("free"), **more), learning.target


def output_error(model: torch.nn.Module, target: Tensor) -> float:
    errors = (states_of(model) - target).square().sum(-1)
    return float((errors / target.square().sum(-1)).mean())


# Steps of a distillation are too small for bfloat16.
@pytest.mark.parametrize(
    ("reconstruction", "dtype"),
    [
        ("obs", torch.float32),
        ("admm", torch.float32),
        ("distill", torch.float32),
        ("distill", torch.bfloat16),
    ],
)
def test_the_model_comes_closer_to_the_dense_one_under_the_same_masks(
    reconstruction: str, dtype: torch.dtype
) -> None:
    learns = {"epochs": 12, "learning_rate": 0.005} if reconstruction == "distill" else {}
    made = method(f"reconstruction={reconstruction}", **learns)
    plain, before, target = reconstructed(None, dtype)
    mended, after, _ = reconstructed(made, dtype)
    assert after.violations == 0
    first_layer = [name for name in before.masks if ".layers.0." in name]
    assert all(torch.equal(before.masks[name], after.masks[name]) for name in first_layer)
    for path, mask in after.masks.items():
        weight = linear_at(mended, path).weight
        assert not weight[~mask].any()
        assert not torch.equal(weight, linear_at(plain, path).weight)
        assert not weight.requires_grad
    assert output_error(mended, target) < 0.95 * output_error(plain, target)


def correlated() -> tuple[Tensor, PrunedLinear]:
    """Return inputs `(400, 64)` that share signal in pairs, and a linear pruned for them."""
    x = random(400, 64).float() + random(400, 32, seed=1).float().repeat_interleave(2, 1)
    x = x[:, shuffled(64)] * torch.logspace(-1, 1, 64)
    weight, perm = random(6, 64, seed=2).float(), shuffled(64, seed=1)
    statistics = InputStatistics(64, "cpu", (Gram,))
    statistics.update(x)
    mask = permuted_nm_mask(weight.abs() * x.norm(dim=0), perm, PATTERN)
    return x.double(), PrunedLinear(weight, weight * mask, mask, perm, PATTERN, statistics)


def squared_error(x: Tensor, linear: PrunedLinear, weight: Tensor) -> Tensor:
    """Return the error of each row's output."""
    return (x @ (weight.double() - linear.dense.double()).T).square().sum(0)


def least_squares(x: Tensor, linear: PrunedLinear) -> Tensor:
    """Return the kept weights of least error, row by row."""
    best = torch.zeros_like(linear.dense, dtype=torch.float64)
    for row, kept in enumerate(linear.mask):
        output = x @ linear.dense[row].double()
        best[row, kept] = torch.linalg.lstsq(x[:, kept], output, driver="gelsd").solution
    return best


def test_obs_lowers_the_output_error_of_a_linear_towards_the_least_squares_optimum() -> None:
    x, linear = correlated()

    def error(weight: Tensor) -> float:
        return float(squared_error(x, linear, weight).sum())

    corrected = OBS(damping=1e-6).linear(linear)
    assert not corrected[~linear.mask].any()
    # SparseGPT corrects each pruned weight with the columns after it alone, so it cannot reach the
    # optimum.
    assert error(least_squares(x, linear)) <= error(corrected) < error(linear.weight)


def test_admm_ends_at_the_least_squares_of_each_row() -> None:
    x, linear = correlated()
    best = least_squares(x, linear)
    found = ADMM(iterations=40, damping=1e-9).linear(linear)
    assert not found[~linear.mask].any()
    least = squared_error(x, linear, best)
    assert (squared_error(x, linear, found) <= 1.01 * least).all()
    # A dozen iterations are nearly there, and no row is worse than before.
    methods = [ADMM(iterations=number, damping=1e-9) for number in (1, 12)]
    errors = [squared_error(x, linear, admm.linear(linear)) for admm in methods]
    assert errors[1].sum() <= 1.05 * least.sum()
    assert all((error <= squared_error(x, linear, linear.weight)).all() for error in errors)
    assert errors[1].sum() < squared_error(x, linear, OBS(damping=1e-6).linear(linear)).sum()
    # Weights that are best already stay: no row is worse, after however few iterations.
    for admm in methods:
        again = admm.linear(replace(linear, weight=best.float()))
        assert (squared_error(x, linear, again) <= (1 + 1e-4) * least).all()


def test_admm_minimises_the_damped_error() -> None:
    x, linear = correlated()
    gram = x.T @ x / len(x)
    hessian = gram + 3.0 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    dense = linear.dense.double()
    best = torch.zeros_like(dense)
    for row, kept in enumerate(linear.mask):
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ dense[row])[kept])

    def error(weight: Tensor) -> float:
        difference = weight.double() - dense
        return float((difference @ hessian * difference).sum())

    found = ADMM(iterations=40, damping=3.0).linear(linear)
    assert error(found) <= 1.001 * error(best)


def test_obs_takes_its_damping() -> None:
    x, linear = correlated()
    gram = x.T @ x
    hessian = gram + 0.3 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    columns = linear.permutation
    dense, mask = linear.dense[:, columns], linear.mask[:, columns]
    expected, _ = reference_update(dense, hessian[columns][:, columns], PATTERN, mask)
    found = OBS(damping=0.3).linear(linear)[:, columns].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
