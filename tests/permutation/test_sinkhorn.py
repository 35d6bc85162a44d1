"""Sinkhorn against the plain formula under autograd, and hard permutations against brute force."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from permllm.permutation.lcp import assignment
from permllm.permutation.lcp.assignment import flatten, harden, harden_together
from permllm.permutation.lcp.settings import SinkhornStart
from permllm.permutation.lcp.sinkhorn import gradient_path, normalize, sinkhorn
from permllm.runtime import parallel


def plain(logits: Tensor, temperature: float, iterations: int, start: str = "exponential") -> Tensor:
    soft = (logits / temperature).exp()
    if start == "softmax":
        soft = soft / soft.sum(2, keepdim=True)
    for _ in range(iterations):
        soft = soft / soft.sum(2, keepdim=True)
        soft = soft / soft.sum(1, keepdim=True)
    return soft


def logits(blocks: int = 3, size: int = 8, scale: float = 1.0) -> Tensor:
    return torch.randn(blocks, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("start", ["exponential", "softmax"])
def test_values_and_gradients_equal_the_plain_formula(iterations: int, temperature: float, start: SinkhornStart) -> None:
    ours, reference = logits().requires_grad_(), logits().requires_grad_()
    weight = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    soft = sinkhorn(ours, temperature, iterations, start)
    expected = plain(reference, temperature, iterations, start)
    torch.testing.assert_close(soft, expected, rtol=1e-12, atol=0)
    (soft * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-9, atol=1e-10)
    # The same gradient without the values.
    alone = logits().requires_grad_()
    path = gradient_path(alone, temperature, normalize(alone, temperature, iterations, start)[1])
    assert path.shape == soft.shape
    (path * weight).sum().backward()
    torch.testing.assert_close(alone.grad, reference.grad, rtol=1e-9, atol=1e-10)


def test_columns_sum_to_one_and_rows_approach_it() -> None:
    start = logits(size=64).float()
    worst = []
    for iterations in (1, 5, 20, 100):
        soft = sinkhorn(start, 1.0, iterations)
        torch.testing.assert_close(soft.sum(1), torch.ones(3, 64), rtol=0, atol=1e-6)
        worst.append(float((soft.sum(2) - 1).abs().max()))
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] < 1e-5


def test_large_logits_at_a_low_temperature_stay_finite() -> None:
    start = logits(scale=30.0).float().requires_grad_()
    soft = sinkhorn(start, 0.1, 5)
    soft.square().sum().backward()
    assert soft.isfinite().all()
    assert start.grad is not None
    assert start.grad.isfinite().all()


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])  # the sharp ones are settled without an assignment
def test_hard_permutation_is_the_best_of_all(sharpness: float) -> None:
    soft = plain(logits(blocks=6, size=5, scale=sharpness), 1.0, 5)
    perms = harden(soft)
    for block, perm in zip(soft, perms, strict=True):
        assert sorted(perm.tolist()) == list(range(5))
        scores = {p: sum(float(block[p[j], j]) for j in range(5)) for p in itertools.permutations(range(5))}
        assert sum(float(block[perm[j], j]) for j in range(5)) == pytest.approx(max(scores.values()), abs=1e-12)


def test_hard_permutation_of_a_permutation_is_itself() -> None:
    perm = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    matrix = torch.zeros(16, 16)
    matrix[perm, torch.arange(16)] = 1.0  # P[perm[j], j] = 1
    assert torch.equal(harden(matrix[None])[0], perm)
    weight = torch.randn(4, 16)
    torch.testing.assert_close(weight @ matrix, weight[:, perm])


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_solve_each_a_share_of_the_blocks_and_all_get_what_one_would(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    softs = [plain(logits(blocks, size, 0.1), 1.0, 5) for blocks, size in ((9, 8), (1, 4), (1, 4), (1, 4), (12, 16))]
    flat, shapes = flatten(softs, sum(soft.numel() for soft in softs))
    solve, solved = assignment.linear_sum_assignment, [0] * processes
    sent: list[Tensor] = []

    def together(rank: int, values: Tensor) -> list[Tensor]:
        def counted(costs: object) -> object:
            solved[rank] += 1
            return solve(costs)

        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(assignment, "linear_sum_assignment", counted)
        return harden_together(values, shapes)

    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    monkeypatch.setattr(parallel, "add_up", lambda tensors: sent.extend(tensor.clone() for tensor in tensors))
    for rank in range(processes):
        together(rank, flat)
    assert max(solved) <= math.ceil(24 / processes)
    assert sum(solved) == 21  # all but the three small ones, which are settled without
    total = torch.stack(sent).sum(0)
    monkeypatch.setattr(parallel, "add_up", lambda tensors: [tensor.copy_(total) for tensor in tensors])
    for rank in range(processes):
        perms = together(rank, flat)
        assert all(torch.equal(perm, harden(soft)) for perm, soft in zip(perms, softs, strict=True))
    # A block that one of them cannot solve fails in all, at the same step.
    sent.clear()
    flat[-1] = torch.nan
    monkeypatch.setattr(parallel, "add_up", lambda tensors: sent.extend(tensor.clone() for tensor in tensors))
    for rank in range(processes):
        with contextlib.suppress(ValueError):
            together(rank, flat)
    total = torch.stack(sent).sum(0)
    monkeypatch.setattr(parallel, "add_up", lambda tensors: [tensor.copy_(total) for tensor in tensors])
    for rank in range(processes):
        with pytest.raises(ValueError, match="not finite"):
            together(rank, flat)
