"""Sinkhorn against the plain formula under autograd, and hard permutations against brute force."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from permllm.permutation.lcp import assignment
from permllm.permutation.lcp import logits as blocks
from permllm.permutation.lcp.assignment import harden, harden_together
from permllm.permutation.lcp.logits import BlockLogits, SoftBatch
from permllm.permutation.lcp.sinkhorn import SinkhornStart, logit_gradient, normalize
from permllm.runtime import parallel
from permllm.training.blocks import BlockStack
from tests.permutation.differentiable import sinkhorn


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
    _, potentials = normalize(logits(), temperature, iterations, start)
    found = logit_gradient(logits(), temperature, potentials, weight)
    torch.testing.assert_close(found, reference.grad, rtol=1e-9, atol=1e-10)


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
    solve, solved = assignment.linear_sum_assignment, [0] * processes
    sent: list[Tensor] = []

    def together(rank: int) -> list[Tensor]:
        def counted(costs: object) -> object:
            solved[rank] += 1
            return solve(costs)

        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(assignment, "linear_sum_assignment", counted)
        return harden_together(softs)

    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    monkeypatch.setattr(parallel, "all_reduce", lambda tensors: sent.extend(tensor.clone() for tensor in tensors))
    for rank in range(processes):
        together(rank)
    assert max(solved) <= math.ceil(24 / processes)
    assert sum(solved) == 21  # all but the three small ones, which are settled without
    total = torch.stack(sent).sum(0)
    monkeypatch.setattr(parallel, "all_reduce", lambda tensors: [tensor.copy_(total) for tensor in tensors])
    for rank in range(processes):
        perms = together(rank)
        assert all(torch.equal(perm, harden(soft)) for perm, soft in zip(perms, softs, strict=True))
    # A block that one of them cannot solve fails in all, at the same step.
    sent.clear()
    softs[-1][-1, -1, -1] = torch.nan
    monkeypatch.setattr(parallel, "all_reduce", lambda tensors: sent.extend(tensor.clone() for tensor in tensors))
    for rank in range(processes):
        with contextlib.suppress(ValueError):
            together(rank)
    total = torch.stack(sent).sum(0)
    monkeypatch.setattr(parallel, "all_reduce", lambda tensors: [tensor.copy_(total) for tensor in tensors])
    for rank in range(processes):
        with pytest.raises(ValueError, match="not finite"):
            together(rank)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_stacks_that_are_normalised_together_have_the_values_and_gradients_of_each_alone(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def order(*counts: int) -> BlockLogits:
        stacks = [BlockStack(8 * sum(counts[:number]), count, 8) for number, count in enumerate(counts)]
        values = [torch.rand(count, 8, 8, dtype=torch.float64, generator=generator) for count in counts]
        return BlockLogits(torch.arange(8 * sum(counts)), stacks, values, scale)

    orders = {"a": order(2), "b": order(1, 3)}
    batch = SoftBatch(orders, [("a", 0), ("b", 0), ("b", 1)], 0.5, 3, "exponential")
    weights = [torch.randn(count, 8, 8, dtype=torch.float64, generator=generator) for count in (2, 1, 3)]
    apart = copy.deepcopy(orders)
    effective = [apart["a"].effective()[0], *apart["b"].effective()]
    softs = [plain(stack, 0.5, 3) for stack in effective]
    for found, soft in zip(batch.split(batch.soft), softs, strict=True):
        torch.testing.assert_close(found, soft, rtol=1e-12, atol=0)
    assert not any(bool(stand_in.any()) for stand_in in batch.stand_ins)
    # The second is used twice, the third not at all.
    ((batch.stand_ins[0] * weights[0]).sum() + 2 * (batch.stand_ins[1] * weights[1]).sum()).backward()
    batch.backward()
    batch.backward()  # which has nothing more to send
    ((softs[0] * weights[0]).sum() + 2 * (softs[1] * weights[1]).sum()).backward()
    for name, block in orders.items():
        for mine, theirs in zip(block.parameters(), apart[name].parameters(), strict=True):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(mine.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_gpu_normalises_blocks_of_one_size_together_as_far_as_its_memory_goes() -> None:
    stacks = [("a", 0, 30), ("b", 0, 30), ("b", 1, 50), ("c", 0, 200), ("d", 0, 10)]
    assert list(blocks._batches(stacks, 100)) == [[("a", 0), ("b", 0)], [("b", 1)], [("c", 0)], [("d", 0)]]
    assert len(list(blocks._batches(stacks, 0))) == 5
