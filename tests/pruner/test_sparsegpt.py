"""SparseGPT's update: in the permuted order, and equal to a plain dense elimination."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from permllm.errors import TrainingError
from permllm.pruner.sparsegpt import SparseGPT, prune_columns
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import nm_mask, permuted_nm_mask, violations
from permllm.sparsity.saliency import saliency
from permllm.sparsity.statistics import Gram, InputStatistics
from tests.problems import PATTERN, random, shuffled


def layer(channels: int = 32, rows: int = 16) -> tuple[Tensor, Tensor, InputStatistics]:
    """Return a weight, inputs whose channels belong together, and their statistics."""
    mix = random(channels, channels) / channels**0.5
    inputs = (random(200, channels, seed=1) @ mix + 0.1 * random(200, channels, seed=2)).float()
    return random(rows, channels, seed=3).float(), inputs, gram_of(inputs)


def gram_of(inputs: Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[1], "cpu", (Gram,))
    statistics.update(inputs)
    return statistics


def hessian_of(inputs: Tensor) -> Tensor:
    x = inputs.double()
    hessian = x.T @ x
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def reference_update(
    w: Tensor, hessian: Tensor, pattern: NMPattern, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Update one column after the other by elimination from the inverse Hessian (float64)."""
    w, kept = w.double().clone(), torch.zeros_like(w, dtype=torch.bool) if keep is None else keep
    inverses = [torch.linalg.inv(hessian[j:, j:])[0] for j in range(len(hessian))]
    for j, inverse in enumerate(inverses):
        if keep is None and j % pattern.m == 0:
            places = range(j, j + pattern.m)
            score = torch.stack([w[:, place].square() / inverses[place][0] for place in places], 1)
            kept[:, j : j + pattern.m] = nm_mask(score, pattern)
        error = torch.where(kept[:, j], 0.0, w[:, j] / inverse[0])
        w[:, j:] -= error[:, None] * inverse
    return w * kept, kept


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "20:40"])
@pytest.mark.parametrize("given", [False, True])
def test_columns_are_pruned_as_by_elimination_from_the_inverse_hessian(
    pattern: str, given: bool
) -> None:
    weight, inputs, _ = layer(280, rows=5)  # more than two of the blocks taken at a time
    nm, w, hessian = NMPattern.parse(pattern), weight.double(), hessian_of(inputs)
    keep = nm_mask(weight.abs(), nm) if given else None
    expected, mask = reference_update(w, hessian, nm, keep)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    found = prune_columns(w, factor, nm, keep)
    assert torch.equal(found, mask)
    torch.testing.assert_close(w * found, expected, rtol=1e-9, atol=1e-9)


def test_weights_of_dead_channels_become_zero_first_as_in_the_official_code() -> None:
    weight, inputs, _ = layer()
    dead = torch.tensor([1, 2, 3, 8, 30])  # more than two of the first group
    inputs[:, dead] = 0.0
    perm = shuffled(32)
    updated, mask = SparseGPT(0.01).update(weight, gram_of(inputs), perm, PATTERN)
    assert not updated[:, dead].any()
    zeroed = weight.double().clone()
    zeroed[:, dead] = 0.0
    hessian = hessian_of(inputs)[perm][:, perm]
    expected, expected_mask = reference_update(zeroed[:, perm], hessian, PATTERN, None)
    assert torch.equal(mask[:, perm], expected_mask)
    torch.testing.assert_close(updated[:, perm], expected.float(), rtol=1e-4, atol=1e-4)


def test_columns_are_visited_and_n_m_holds_in_the_permuted_order() -> None:
    weight, inputs, statistics = layer()
    perm = shuffled(32)
    updated, mask = SparseGPT(0.01).update(weight, statistics, perm, PATTERN)
    permuted, order = gram_of(inputs[:, perm]), torch.arange(32)
    expected, expected_mask = SparseGPT(0.01).update(weight[:, perm], permuted, order, PATTERN)
    assert torch.equal(mask[:, perm], expected_mask)
    torch.testing.assert_close(updated[:, perm], expected, rtol=1e-4, atol=1e-4)
    assert violations(updated, perm, PATTERN) == 0
    assert torch.equal(mask[:, perm].unflatten(1, (-1, 4)).sum(-1), torch.full((16, 8), 2))
    assert not torch.signbit(updated[~mask]).any()
    # Better than no update, and than the masks of the saliency.
    reference = inputs @ weight.T
    error = (inputs @ updated.T - reference).square().sum()
    scores = saliency(weight, SparseGPT(0.01).factors(weight, statistics))
    for kept in (mask, permuted_nm_mask(scores, perm, PATTERN)):
        assert error < (inputs @ (weight * kept).T - reference).square().sum()


def test_channels_that_are_never_active_do_no_harm() -> None:
    weight, inputs, _ = layer()
    inputs[:, 3] = 0
    statistics, order = gram_of(inputs), torch.arange(32)
    updated, mask = SparseGPT(0.01).update(weight, statistics, order, PATTERN)
    assert updated.isfinite().all()
    # All that is known of such a channel is lambda, which follows the scale of the inputs: so do no
    # masks.
    column = SparseGPT(0.01).factors(weight, statistics).column[0]
    diagonal = inputs.double().square().mean(0)
    assert float(column[3]) == pytest.approx(0.01 * float(diagonal.mean()), rel=1e-4)
    assert column.argmin() == 3
    small = gram_of(inputs * 0.01)
    assert torch.equal(SparseGPT(0.01).update(weight, small, order, PATTERN)[1], mask)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    weight, _, statistics = layer()
    statistics[Gram].value[0, 0] = -1e6
    with pytest.raises(TrainingError):
        SparseGPT(0.01).factors(weight, statistics)


def test_without_inputs_the_kept_weights_stay() -> None:
    weight, inputs, _ = layer()
    whole = torch.ones(16, 32, dtype=torch.bool)
    statistics = gram_of(torch.zeros_like(inputs))
    updated, _ = SparseGPT(0.01).update(weight, statistics, torch.arange(32), PATTERN, whole)
    assert torch.equal(updated, weight)
