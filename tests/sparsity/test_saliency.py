"""Every pruner's saliency against its formula, written out entry by entry in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.pruner.magnitude import Magnitude
from permllm.pruner.ria import RIA
from permllm.pruner.sparsegpt import SparseGPT
from permllm.pruner.wanda import Wanda
from permllm.sparsity.saliency import SaliencyFactors, saliency, saliency_t
from permllm.sparsity.statistics import Gram, InputStatistics, Norm
from tests.problems import random, shuffled

ROWS, CHANNELS, TOKENS = 5, 12, 40


@pytest.fixture
def weight() -> Tensor:
    return random(ROWS, CHANNELS).float()


@pytest.fixture
def inputs() -> Tensor:
    scale = torch.linspace(0.1, 3.0, CHANNELS)
    return random(4, TOKENS // 4, CHANNELS, seed=1).float() * scale


@pytest.fixture
def statistics(inputs: Tensor) -> InputStatistics:
    sums = InputStatistics(CHANNELS, "cpu", (Norm, Gram))
    sums.update(inputs[:1])
    sums.update(inputs[1:])
    return sums


def norms(inputs: Tensor) -> list[float]:
    columns = inputs.flatten(0, 1).double().t()
    return [math.sqrt(sum(float(value) ** 2 for value in one) / TOKENS) for one in columns]


def table(formula: Callable[[int, int], float]) -> Tensor:
    found = [[formula(i, j) for j in range(CHANNELS)] for i in range(ROWS)]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    "pruner", [Magnitude(), Wanda(), RIA(0.5), RIA(0.0), RIA(1.0), SparseGPT(0.01)]
)
def test_a_pruners_saliency_is_its_formula(
    weight: Tensor, inputs: Tensor, statistics: InputStatistics, pruner: Any
) -> None:
    w, norm, rows = weight.double().abs(), norms(inputs), inputs.flatten(0, 1).double()
    hessian = rows.T @ rows / TOKENS
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(CHANNELS, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)

    def formula(i: int, j: int) -> float:
        of_weight = float(w[i, j])
        if isinstance(pruner, Magnitude):
            return of_weight
        if isinstance(pruner, Wanda):
            return of_weight * norm[j]
        if isinstance(pruner, RIA):
            shares = of_weight / float(w[:, j].sum()) + of_weight / float(w[i].sum())
            return shares * norm[j] ** pruner.exponent
        assert isinstance(pruner, SparseGPT)
        return of_weight**2 / float(inverse[j, j])

    found = saliency(weight, pruner.factors(weight, statistics)).double()
    rounding = {Magnitude: 0.0, SparseGPT: 1e-4}.get(type(pruner), 1e-5)
    torch.testing.assert_close(found, table(formula), rtol=rounding, atol=0)


@pytest.mark.parametrize("empty", ["row", "column"])
def test_ria_of_a_weight_that_has_lost_a_row_or_a_column(
    weight: Tensor, inputs: Tensor, empty: str
) -> None:
    (weight[2] if empty == "row" else weight[:, 3]).zero_()
    norm, w = [400 * value for value in norms(inputs)], weight.double().abs()
    many = InputStatistics(CHANNELS, "cpu", (Norm,))
    many.update(400 * inputs)

    def share(value: Tensor, total: Tensor) -> float:
        return float(value) / float(total) if float(total) else 0.0

    expected = table(
        lambda i, j: (share(w[i, j], w[:, j].sum()) + share(w[i, j], w[i].sum())) * norm[j] ** 0.5
    )
    found = saliency(weight, RIA(0.5).factors(weight, many)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("flattened", [False, True])
def test_the_norm_of_the_released_code_divides_by_samples(inputs: Tensor, flattened: bool) -> None:
    sums = InputStatistics(CHANNELS, "cpu", (Norm,), norm_tokens=inputs.shape[1])
    for part in (inputs[:1], inputs[1:]):
        sums.update(part.flatten(0, 1) if flattened else part)
    expected = (inputs.double().square().sum((0, 1)) / len(inputs)).sqrt()
    torch.testing.assert_close(sums[Norm].value.double(), expected, rtol=1e-6, atol=0)


def test_factors_can_be_permuted_scaled_and_transposed(
    weight: Tensor, statistics: InputStatistics
) -> None:
    perm, score = shuffled(CHANNELS), random(ROWS, CHANNELS, seed=2).abs().float()
    dense = [SaliencyFactors(power, score) for power in (1, 2)]
    pruners = (Magnitude(), Wanda(), RIA(0.5), SparseGPT(0.01))
    for factors in (*(pruner.factors(weight, statistics) for pruner in pruners), *dense):
        full = saliency(weight, factors)
        torch.testing.assert_close(saliency(weight[:, perm], factors.permuted(perm)), full[:, perm])
        torch.testing.assert_close(saliency_t(weight.t(), factors), full.t())
    for power, factors in enumerate(dense, 1):
        torch.testing.assert_close(saliency(weight, factors), weight.abs() ** power * score)
