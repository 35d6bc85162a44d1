"""SparseGPT's update: better than none, in the permuted order, and equal to a plain dense elimination."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.pruning.sparsegpt import SparseGPT
from permllm.runs.masks import violations
from permllm.sparsity.gram import Gram
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import saliency
from permllm.sparsity.statistics import InputStatistics

PATTERN = NMPattern(2, 4)


def problem(channels: int = 32, rows: int = 16) -> tuple[Tensor, Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    inputs = torch.randn(200, channels, generator=generator) @ mix + 0.1 * torch.randn(200, channels, generator=generator)
    statistics = InputStatistics(channels, "cpu", (Gram,))
    statistics.update(inputs)
    return torch.randn(rows, channels, generator=generator), inputs, statistics


def reference_update(weight: Tensor, inputs: Tensor, perm: Tensor, mask: Tensor) -> Tensor:
    """Optimal brain surgeon, one column after the other, by eliminating from the inverse Hessian (float64)."""
    w = weight[:, perm].double().clone()
    keep = mask[:, perm]
    x = inputs[:, perm].double()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(perm), dtype=torch.float64)
    for j in range(len(perm)):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = torch.where(keep[:, j], 0.0, w[:, j] / inverse[0, 0])
        w[:, j:] -= error[:, None] * inverse[0][None, :]
    return (w * keep)[:, perm.argsort()]


@pytest.mark.parametrize("channels", [32, 160])  # 160 crosses the boundary of the columns taken at a time
def test_update_with_a_given_mask_equals_column_wise_elimination(channels: int) -> None:
    weight, inputs, statistics = problem(channels)
    perm = torch.randperm(channels, generator=torch.Generator().manual_seed(5))
    pruner = SparseGPT()
    mask = permuted_nm_mask(saliency(weight, pruner.factors(weight, statistics)), perm, PATTERN)
    updated, kept = pruner.update(weight, statistics, perm, PATTERN, mask)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(updated.double(), reference_update(weight, inputs, perm, mask), rtol=1e-3, atol=1e-3)


def test_update_beats_no_update_on_the_layers_output_and_keeps_n_m_in_permuted_order() -> None:
    weight, inputs, statistics = problem()
    perm = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    updated, mask = SparseGPT().update(weight, statistics, perm, PATTERN)
    reference = inputs @ weight.T
    error = (inputs @ updated.T - reference).square().sum()
    assert error < (inputs @ (weight * mask).T - reference).square().sum()
    one_shot = permuted_nm_mask(saliency(weight, SparseGPT().factors(weight, statistics)), perm, PATTERN)
    assert error < (inputs @ (weight * one_shot).T - reference).square().sum()
    assert violations(updated, perm, PATTERN) == 0
    assert torch.equal(mask[:, perm].unflatten(1, (-1, 4)).sum(-1), torch.full((16, 8), 2))
    assert not torch.signbit(updated[~mask]).any()


def test_columns_are_visited_in_the_permuted_order() -> None:
    weight, inputs, statistics = problem()
    perm = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    permuted_statistics = InputStatistics(32, "cpu", (Gram,))
    permuted_statistics.update(inputs[:, perm])
    updated, mask = SparseGPT().update(weight, statistics, perm, PATTERN)
    expected, expected_mask = SparseGPT().update(weight[:, perm], permuted_statistics, torch.arange(32), PATTERN)
    assert torch.equal(mask[:, perm], expected_mask)
    torch.testing.assert_close(updated[:, perm], expected, rtol=1e-4, atol=1e-4)


def test_channels_that_are_never_active_do_no_harm() -> None:
    weight, inputs, _ = problem()
    inputs[:, 3] = 0
    statistics = InputStatistics(32, "cpu", (Gram,))
    statistics.update(inputs)
    updated, mask = SparseGPT().update(weight, statistics, torch.arange(32), PATTERN)
    assert updated.isfinite().all()
    # All that is known of such a channel is lambda, which follows the scale of the inputs: so do no masks.
    column = SparseGPT().factors(weight, statistics).column[0]
    diagonal = inputs.double().square().mean(0)
    assert float(column[3]) == pytest.approx(0.01 * float(diagonal.mean()), rel=1e-4)
    assert column.argmin() == 3
    small = InputStatistics(32, "cpu", (Gram,))
    small.update(inputs * 0.01)
    assert torch.equal(SparseGPT().update(weight, small, torch.arange(32), PATTERN)[1], mask)
