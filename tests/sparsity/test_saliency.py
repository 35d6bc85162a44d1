"""Every pruner's saliency against its formula, written out entry by entry in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from permllm.pruning.magnitude import Magnitude
from permllm.pruning.ria import RIA
from permllm.pruning.sparsegpt import SparseGPT
from permllm.pruning.wanda import Wanda
from permllm.sparsity.saliency import SaliencyFactors, saliency, saliency_t
from permllm.sparsity.statistics import Gram, InputStatistics, Norm

ROWS, CHANNELS, TOKENS = 5, 12, 40


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    scale = torch.linspace(0.1, 3.0, CHANNELS)
    return torch.randn(4, TOKENS // 4, CHANNELS, generator=torch.Generator().manual_seed(1)) * scale


@pytest.fixture
def statistics(inputs: Tensor) -> InputStatistics:
    sums = InputStatistics(CHANNELS, "cpu", (Norm, Gram))
    sums.update(inputs[:1])
    sums.update(inputs[1:])
    return sums


def norms(inputs: Tensor) -> list[float]:
    rows = inputs.flatten(0, 1).double()
    return [math.sqrt(sum(float(value) ** 2 for value in rows[:, j]) / TOKENS) for j in range(CHANNELS)]


def table(formula: object) -> Tensor:
    return torch.tensor([[formula(i, j) for j in range(CHANNELS)] for i in range(ROWS)], dtype=torch.float64)  # type: ignore[operator]


def test_magnitude(weight: Tensor, statistics: InputStatistics) -> None:
    expected = table(lambda i, j: abs(float(weight[i, j])))
    assert torch.equal(saliency(weight, Magnitude().factors(weight, statistics)).double(), expected)


def test_wanda(weight: Tensor, inputs: Tensor, statistics: InputStatistics) -> None:
    norm = norms(inputs)
    expected = table(lambda i, j: abs(float(weight[i, j])) * norm[j])
    torch.testing.assert_close(saliency(weight, Wanda().factors(weight, statistics)).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [0.5, 0.0, 1.0])
def test_ria(weight: Tensor, inputs: Tensor, statistics: InputStatistics, exponent: float) -> None:
    norm = norms(inputs)
    w = weight.double().abs()
    expected = table(
        lambda i, j: (float(w[i, j]) / float(w[:, j].sum()) + float(w[i, j]) / float(w[i].sum())) * norm[j] ** exponent
    )
    found = saliency(weight, RIA(exponent).factors(weight, statistics)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("empty", ["row", "column"])
def test_ria_of_a_weight_that_has_lost_a_row_or_a_column(
    weight: Tensor, inputs: Tensor, statistics: InputStatistics, empty: str
) -> None:
    (weight[2] if empty == "row" else weight[:, 3]).zero_()
    norm, w = [400 * value for value in norms(inputs)], weight.double().abs()
    many = InputStatistics(CHANNELS, "cpu", (Norm,))
    many.update(400 * inputs)

    def share(value: Tensor, total: Tensor) -> float:
        return float(value) / float(total) if float(total) else 0.0

    expected = table(lambda i, j: (share(w[i, j], w[:, j].sum()) + share(w[i, j], w[i].sum())) * norm[j] ** 0.5)
    found = saliency(weight, RIA(0.5).factors(weight, many)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_sparsegpt(weight: Tensor, inputs: Tensor, statistics: InputStatistics) -> None:
    rows = inputs.flatten(0, 1).double()
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(CHANNELS, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    expected = table(lambda i, j: float(weight[i, j]) ** 2 / float(inverse[j, j]))
    found = saliency(weight, SparseGPT(0.01).factors(weight, statistics)).double()
    # The Hessian is a mean over tokens in the code and a sum here: a constant factor, which moves no mask.
    torch.testing.assert_close(found * TOKENS, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("flattened", [False, True])
def test_the_norm_of_the_released_code_divides_by_samples(inputs: Tensor, flattened: bool) -> None:
    sums = InputStatistics(CHANNELS, "cpu", (Norm,), norm_tokens=inputs.shape[1])
    for part in (inputs[:1], inputs[1:]):
        sums.update(part.flatten(0, 1) if flattened else part)
    expected = (inputs.double().square().sum((0, 1)) / len(inputs)).sqrt()
    torch.testing.assert_close(sums[Norm].value.double(), expected, rtol=1e-6, atol=0)


def test_a_dense_score_is_a_factor_for_each_weight(weight: Tensor) -> None:
    score = torch.rand(ROWS, CHANNELS, generator=torch.Generator().manual_seed(3))
    perm = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(2))
    for power in (1, 2):
        factors = SaliencyFactors.of_each_weight(score, power)
        assert factors.dense
        expected = table(lambda i, j, power=power: abs(float(weight[i, j])) ** power * float(score[i, j]))
        for found in (saliency(weight, factors), saliency_t(weight.t(), factors).t(), saliency(weight, factors.scaled(2)) / 2):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        found = saliency(weight[:, perm], factors.permuted(perm))
        torch.testing.assert_close(found.double(), expected[:, perm], rtol=1e-6, atol=0)


def test_factors_can_be_permuted_scaled_and_transposed(weight: Tensor, statistics: InputStatistics) -> None:
    perm = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(2))
    for pruner in (Magnitude(), Wanda(), RIA(), SparseGPT()):
        factors = pruner.factors(weight, statistics)
        full = saliency(weight, factors)
        torch.testing.assert_close(saliency(weight[:, perm], factors.permuted(perm)), full[:, perm])
        torch.testing.assert_close(saliency_t(weight.t(), factors), full.t())
        torch.testing.assert_close(saliency(weight, factors.scaled(3.0)), full * 3)
