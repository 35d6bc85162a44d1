"""Sinkhorn against autograd, and hard permutations against brute force: `P[perm[j], j] = 1`."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from permllm.permutation.lcp import assignment
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.logits import BlockLogits, SoftBatch
from permllm.permutation.lcp.sinkhorn import logit_gradient, normalize
from permllm.runtime import parallel
from permllm.training.blocks import BlockStack
from tests.permutation.differentiable import sinkhorn


def logits(blocks: int = 3, size: int = 8, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(
            blocks, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        * scale
    )


@pytest.mark.parametrize(
    ("halves", "temperature", "scale"),
    [
        (0, 1.0, 1.0),
        (1, 1.0, 1.0),
        (2, 1.0, 1.0),
        (10, 1.0, 1.0),
        (0, 0.1, 1.0),
        (10, 0.1, 1.0),
        (10, 0.1, 30.0),
    ],
)
def test_values_and_gradients_equal_the_plain_formula(
    halves: int, temperature: float, scale: float
) -> None:
    reference = logits(scale=scale).requires_grad_()
    weight = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    soft, potentials = normalize(logits(scale=scale), temperature, halves)
    expected = sinkhorn(reference, temperature, halves / 2)
    torch.testing.assert_close(soft, expected, rtol=1e-9, atol=0)
    (expected * weight).sum().backward()
    found = logit_gradient(logits(scale=scale), temperature, potentials, weight)
    assert found.isfinite().all()
    torch.testing.assert_close(found, reference.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "sharpness", [0.1, 1.0, 10.0]
)  # the sharp ones are settled without an assignment
def test_hard_permutation_is_the_best_of_all(sharpness: float) -> None:
    soft = sinkhorn(logits(blocks=6, size=5, scale=sharpness), 1.0, 5)
    for block, perm in zip(soft, harden([soft])[0], strict=True):
        assert sorted(perm.tolist()) == list(range(5))
        scores = {
            p: sum(float(block[p[j], j]) for j in range(5))
            for p in itertools.permutations(range(5))
        }
        assert sum(float(block[perm[j], j]) for j in range(5)) == pytest.approx(
            max(scores.values()), abs=1e-12
        )


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_solve_a_share_of_the_blocks_each_and_have_all(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    softs = [
        sinkhorn(logits(blocks, size, 0.1), 1.0, 5) for blocks, size in ((9, 8), (1, 4), (12, 16))
    ]
    expected, solve, solved = harden(softs), assignment.linear_sum_assignment, [0] * ranks
    total = [torch.zeros_like(perm) for perm in expected]

    def summed(rank: int) -> list[Tensor]:
        def counted(costs: object) -> object:
            solved[rank] += 1
            return solve(costs)

        def all_reduce(mine: list[Tensor]) -> None:
            for whole, part in zip(total, mine, strict=True):
                whole += part

        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(assignment, "linear_sum_assignment", counted)
        monkeypatch.setattr(parallel, "all_reduce", all_reduce)
        return harden(softs)

    monkeypatch.setattr(parallel, "world_size", lambda: ranks)
    for rank in range(ranks):
        summed(rank)
    assert all(map(torch.equal, total, expected))
    assert sum(solved) == 21  # all but the small one, which is settled without
    assert max(solved) <= -(-9 // ranks) + -(-12 // ranks)
    # A block that one of them cannot solve fails in all, at the same step.
    softs[-1][-1, -1, -1] = torch.nan
    for rank in range(ranks):
        with pytest.raises(ValueError, match="not finite"):
            summed(rank)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_stacks_that_are_normalised_together_have_the_values_and_gradients_of_each_alone(
    scale: float | None,
) -> None:
    generator = torch.Generator().manual_seed(0)

    def order(*counts: int) -> BlockLogits:
        stacks = [
            BlockStack(8 * sum(counts[:number]), count, 8) for number, count in enumerate(counts)
        ]
        values = [
            torch.rand(count, 8, 8, dtype=torch.float64, generator=generator) for count in counts
        ]
        return BlockLogits(torch.arange(8 * sum(counts)), stacks, values, scale)

    orders = {"a": order(2), "b": order(1, 3)}
    batch = SoftBatch(orders, [("a", 0), ("b", 0), ("b", 1)], 0.5, 6)
    weights = [
        torch.randn(count, 8, 8, dtype=torch.float64, generator=generator) for count in (2, 1, 3)
    ]
    apart = copy.deepcopy(orders)
    softs = [sinkhorn(stack, 0.5, 3) for order in apart.values() for stack in order.effective()]
    for (_, found), soft in zip(batch.parts(batch.soft), softs, strict=True):
        torch.testing.assert_close(found, soft, rtol=1e-12, atol=0)
    assert not any(bool(stand_in.any()) for stand_in in batch.stand_ins)
    for some in (batch.stand_ins, softs):  # of two portions, and the second stack used twice
        (some[0] * weights[0]).sum().backward(retain_graph=True)
        (2 * (some[1] * weights[1]).sum() + (some[2] * weights[2]).sum()).backward()
    batch.backward()
    for name, block in orders.items():
        for mine, theirs in zip(block.parameters(), apart[name].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
