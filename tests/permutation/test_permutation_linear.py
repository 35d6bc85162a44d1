"""Masked linear against design formulas with explicit dense permutation matrices, in float64."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from permllm.permutation.foldable import split_blocks
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.permutation_linear import PermutationLinear, StraightThrough
from permllm.permutation.lcp.sinkhorn import BlockLogits
from permllm.settings.config import NMPattern
from permllm.sparsity.saliency import SaliencyFactors, saliency
from tests.problems import random, shuffled, sinkhorn, straight_through


class Step(NamedTuple):
    """A step of a masked linear that has run backward, and what it was made of."""

    linear: nn.Linear
    logits: BlockLogits
    start: list[Tensor]
    order: Tensor
    x: Tensor
    grad: Tensor
    output: Tensor


def step(
    factors: SaliencyFactors, pattern: NMPattern, way: StraightThrough, seed: int, bias: bool = True
) -> Step:
    """Run a layer of 40 channels, two blocks of 16 and one of 8, from random logits."""
    torch.manual_seed(seed)
    linear = nn.Linear(40, 10, bias=bias, dtype=torch.float64).requires_grad_(False)
    linear.weight.normal_()
    stacks = split_blocks(40, 16)
    start = [random(stack.count, stack.size, stack.size, seed=seed) for stack in stacks]
    logits = BlockLogits(shuffled(40, seed), stacks, [stack.clone() for stack in start])
    module = PermutationLinear(linear, factors, pattern, stacks, way)
    soft = [sinkhorn(logits.effective(number), 0.7, 3) for number in range(len(stacks))]
    hard = torch.cat([perm.flatten() for perm in harden(soft)])
    order = logits.permutation(hard)
    module.set_permutation(order, hard, soft)
    x, grad = random(3, 7, 40, seed=seed).requires_grad_(), random(3, 7, 10, seed=seed + 1)
    output = module(x)
    output.backward(grad)
    return Step(linear, logits, start, order, x, grad, output)


def factors_of(form: str, power: int = 1) -> SaliencyFactors:
    terms = {"one term": 1, "two terms": 2, "dense": 10}[form]
    column, row = (random(terms, size).abs() + 0.5 for size in (40, 10))
    return SaliencyFactors(power, column, row if form == "two terms" else None)


def dense_mask(
    score: Tensor, hard: Tensor, soft: Tensor, pattern: NMPattern, variant: str
) -> Tensor:
    """Return the method's mask by dense matrices."""
    p = straight_through(hard, soft)
    groups = (score @ p).unflatten(1, (-1, pattern.m))
    soft_mask = groups.softmax(-1).flatten(1)
    largest = groups.topk(pattern.n, dim=2).indices
    kept = torch.zeros_like(groups).scatter_(2, largest, 1.0).flatten(1)
    if variant == "hard":
        return straight_through(kept, soft_mask) @ p.T
    return straight_through(kept @ hard.T, soft_mask @ p.T)


@pytest.mark.parametrize("variant", ["hard", "soft"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8)])
@pytest.mark.parametrize("form", ["one term", "two terms", "dense"])
@pytest.mark.parametrize(("power", "bias"), [(1, True), (2, False)])
def test_output_and_gradients_equal_the_dense_formula(
    variant: Literal["hard", "soft"], n: int, m: int, form: str, power: int, bias: bool
) -> None:
    factors, pattern = factors_of(form, power), NMPattern(n, m)
    ours = step(factors, pattern, variant, n * m + power, bias)
    reference = [stack.clone().requires_grad_() for stack in ours.start]
    x = ours.x.detach().clone().requires_grad_()
    # P[base[b B + i], b B + j] = blocks[b][i, j]
    blocks = torch.block_diag(*(block for stack in reference for block in sinkhorn(stack, 0.7, 3)))
    soft = torch.zeros_like(blocks).index_put((ours.logits.base,), blocks)
    hard = torch.zeros_like(soft)
    hard[ours.order, torch.arange(40)] = 1.0
    factor = factors.column if factors.row is None else factors.row.T @ factors.column
    score = ours.linear.weight.abs() ** power * factor
    mask = dense_mask(score, hard, soft, pattern, variant)
    expected = nn.functional.linear(x, ours.linear.weight * mask, ours.linear.bias)
    expected.backward(ours.grad)
    torch.testing.assert_close(ours.output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.x.grad, x.grad, rtol=1e-10, atol=1e-10)
    for parameter, stack in zip(ours.logits.logits, reference, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, stack.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["one term", "dense"])
def test_the_gradient_of_a_swap_reaches_the_logits_of_its_channel_and_group(form: str) -> None:
    """Compare with the definition: a linear loss after each swap, and Sinkhorn by itself."""
    factors, pattern = factors_of(form), NMPattern(2, 4)
    ours = step(factors, pattern, "swap", 0)
    x, grad = ours.x.detach().flatten(0, 1), ours.grad.flatten(0, 1)
    slope = (grad.T @ x) * ours.linear.weight  # of the loss by each entry of the mask
    score = saliency(ours.linear.weight, factors)

    def loss(members: list[int]) -> float:
        kept = score[:, members].topk(min(pattern.n, len(members)), dim=1).indices
        return float(slope[:, members].gather(1, kept).sum())

    for index, stack in enumerate(ours.logits.stacks):
        expected = torch.zeros(stack.count, stack.size, stack.size, dtype=torch.float64)
        for block in range(stack.count):
            start = stack.start + block * stack.size
            for source in range(stack.size):
                channel = int(ours.logits.base[start + source])
                for first in range(0, stack.size, pattern.m):
                    group = ours.order[start + first : start + first + pattern.m].tolist()
                    rests = [[member for member in group if member != gone] for gone in group]
                    if channel in group:
                        change = loss(group) - loss(rests[group.index(channel)])
                    else:
                        change = sum(loss([*rest, channel]) - loss(rest) for rest in rests) / 4
                    expected[block, source, first : first + pattern.m] = change
        reference = ours.start[index].clone().requires_grad_()
        (sinkhorn(reference, 0.7, 3) * expected).sum().backward()
        found = ours.logits.logits[index].grad
        torch.testing.assert_close(found, reference.grad, rtol=1e-10, atol=1e-12)


def test_the_scale_of_the_paper_start_is_learned_and_clamped_with_a_gradient_that_passes() -> None:
    start = torch.full((1, 8, 8), 0.3) + torch.eye(8)
    logits = BlockLogits(torch.arange(8), split_blocks(8, 8), [start.clone()], scale=2.0)
    soft = sinkhorn(logits.effective(0), 1.0, 2)
    torch.testing.assert_close(soft, sinkhorn(start.mul(2).clamp(-1, 1), 1.0, 2))
    weight = torch.randn(8, 8)
    (soft * weight).sum().backward()
    scale = torch.tensor(2.0, requires_grad=True)
    reference = start.requires_grad_()
    used = reference * scale
    (sinkhorn(used + (used.clamp(-1, 1) - used).detach(), 1.0, 2) * weight).sum().backward()
    assert logits.scale is not None
    torch.testing.assert_close(logits.scale.grad, scale.grad)
    torch.testing.assert_close(logits.logits[0].grad, reference.grad)
    assert reference.grad is not None
    at_the_bound = reference.grad[:, torch.arange(8), torch.arange(8)]
    assert at_the_bound.abs().min() > 0


@pytest.mark.parametrize(
    ("channels", "size", "segment", "expected"),
    [
        (576, 64, None, [(0, 9, 64)]),
        (576, 128, None, [(0, 4, 128), (512, 1, 64)]),
        (32, 64, None, [(0, 1, 32)]),
        (24, 4, 8, [(0, 6, 4)]),
        (24, 12, 8, [(0, 3, 8)]),
    ],
)
def test_blocks_cover_the_channels_and_are_cut_to_a_segment(
    channels: int, size: int, segment: int | None, expected: list[tuple[int, int, int]]
) -> None:
    stacks = split_blocks(channels, size, segment)
    assert [(stack.start, stack.count, stack.size) for stack in stacks] == expected
