"""Sinkhorn against autograd, and hard permutations against brute force: `P[perm[j], j] = 1`."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from permllm.permutation.foldable import BlockStack
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.sinkhorn import BlockLogits, SoftBatch, logit_gradient, normalize
from tests.problems import random, sinkhorn


@pytest.mark.parametrize(
    ("half_iterations", "temperature", "scale"),
    [(0, 1.0, 1.0), (1, 1.0, 1.0), (10, 1.0, 1.0), (10, 0.1, 1.0), (10, 0.1, 30.0)],
)
def test_values_and_gradients_equal_the_plain_formula(
    half_iterations: int, temperature: float, scale: float
) -> None:
    logits, weight = scale * random(3, 8, 8), random(3, 8, 8, seed=1)
    reference = logits.clone().requires_grad_()
    soft, potentials = normalize(logits, temperature, half_iterations)
    expected = sinkhorn(reference, temperature, half_iterations / 2)
    torch.testing.assert_close(soft, expected, rtol=1e-9, atol=0)
    (expected * weight).sum().backward()
    found = logit_gradient(logits, temperature, potentials, weight)
    assert found.isfinite().all()
    torch.testing.assert_close(found, reference.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])  # the last needs no assignment
def test_hard_permutation_is_the_best_of_all(sharpness: float) -> None:
    soft = sinkhorn(sharpness * random(6, 5, 5), 1.0, 5)
    for block, perm in zip(soft, harden([soft])[0], strict=True):
        orders = [list(order) for order in itertools.permutations(range(5))]
        best = max(float(block[order, range(5)].sum()) for order in orders)
        assert perm.tolist() in orders
        assert float(block[perm, range(5)].sum()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_stacks_that_are_normalised_together_have_the_values_and_gradients_of_each_alone(
    scale: float | None,
) -> None:
    def order(*counts: int) -> BlockLogits:
        starts = [8 * sum(counts[:number]) for number in range(len(counts))]
        stacks = [BlockStack(start, count, 8) for start, count in zip(starts, counts, strict=True)]
        values = [random(count, 8, 8, seed=count).sigmoid() for count in counts]
        return BlockLogits(torch.arange(8 * sum(counts)), stacks, values, scale)

    orders = {"a": order(2), "b": order(1, 3)}
    stacks = [("a", 0), ("b", 0), ("b", 1)]
    batch = SoftBatch(orders, stacks, 0.5, 6)
    weights = [random(count, 8, 8, seed=9) for count in (2, 1, 3)]
    apart = copy.deepcopy(orders)
    softs = [sinkhorn(apart[name].effective(number), 0.5, 3) for name, number in stacks]
    for found, soft in zip(batch.parts(batch.soft).values(), softs, strict=True):
        torch.testing.assert_close(found, soft, rtol=1e-12, atol=0)
    placeholders = list(batch.placeholders.values())
    assert not any(bool(placeholder.any()) for placeholder in placeholders)
    for some in (placeholders, softs):  # of two portions, and the second stack used twice
        (some[0] * weights[0]).sum().backward(retain_graph=True)
        (2 * (some[1] * weights[1]).sum() + (some[2] * weights[2]).sum()).backward()
    batch.backward()
    for name, block in orders.items():
        for mine, theirs in zip(block.parameters(), apart[name].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
