"""Reconstructions lower the error and keep the masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.models.families import decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.permutation.heuristic import Heuristic
from permllm.pruning.admm import ADMM
from permllm.pruning.distill import Distill
from permllm.pruning.layerwise import Found, PrunedModel
from permllm.pruning.reconstruction import PrunedLinear
from permllm.pruning.sparsegpt import OBS
from permllm.pruning.wanda import Wanda
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.statistics import Gram, InputStatistics
from tests.conftest import tiny_model
from tests.pruning.test_layerwise import problem, pruned, tokens


def reconstructed(
    reconstruction: Any, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, PrunedModel, Tensor]:
    model = tiny_model("llama", dtype=dtype)
    learning = problem(model, Wanda())
    result = pruned(
        model, Wanda(), Found(learning.factors), Heuristic(), reconstruction=reconstruction
    )
    return model, result, learning.target


def output_error(model: torch.nn.Module, target: Tensor) -> float:
    stream = LayerStream(model, tokens(), 4)
    for index in range(len(decoder_layers(model))):
        stream.advance(index)
    return float(((stream.states() - target).square().sum(-1) / target.square().sum(-1)).mean())


@pytest.mark.parametrize(
    ("reconstruction", "dtype"),
    [
        (OBS(), torch.float32),
        (ADMM(), torch.float32),
        (Distill(epochs=20, learning_rate=0.003), torch.float32),
        (
            Distill(epochs=20, learning_rate=0.003),
            torch.bfloat16,
        ),  # steps are too small for the format
    ],
)
def test_the_model_comes_closer_to_the_dense_one_under_the_same_masks(
    reconstruction: Any, dtype: torch.dtype
) -> None:
    plain, before, target = reconstructed(None, dtype)
    mended, after, _ = reconstructed(reconstruction, dtype)
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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) + torch.randn(
        400, 32, generator=generator
    ).repeat_interleave(2, 1)
    x = x[:, torch.randperm(64, generator=generator)] * torch.logspace(-1, 1, 64)
    weight = torch.randn(6, 64, generator=generator)
    statistics = InputStatistics(64, "cpu", (Gram,))
    statistics.update(x)
    perm = torch.randperm(64, generator=generator)
    mask = permuted_nm_mask(weight.abs() * x.norm(dim=0), perm, NMPattern(2, 4))
    return x.double(), PrunedLinear(weight, weight * mask, mask, perm, NMPattern(2, 4), statistics)


def squared_error(x: Tensor, linear: PrunedLinear, weight: Tensor) -> Tensor:
    """Return the error of each row's output."""
    return (x @ (weight.double() - linear.dense.double()).T).square().sum(0)


def least_squares(x: Tensor, linear: PrunedLinear) -> Tensor:
    """Return the kept weights of least error, row by row."""
    best = torch.zeros_like(linear.dense, dtype=torch.float64)
    for row, kept in enumerate(linear.mask):
        best[row, kept] = torch.linalg.lstsq(
            x[:, kept], x @ linear.dense[row].double(), driver="gelsd"
        ).solution
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
    errors = [
        squared_error(x, linear, ADMM(iterations=number, damping=1e-9).linear(linear))
        for number in (1, 12)
    ]
    assert errors[1].sum() <= 1.05 * least.sum()
    assert all((error <= squared_error(x, linear, linear.weight)).all() for error in errors)
    assert errors[1].sum() < squared_error(x, linear, OBS(damping=1e-6).linear(linear)).sum()
    # Weights that are best already stay.
    again = ADMM(damping=1e-9).linear(replace(linear, weight=best.float()))
    assert squared_error(x, linear, again).sum() <= 1.0001 * least.sum()
