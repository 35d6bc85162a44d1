"""The masked linear against design formulas with explicit dense permutation matrices, in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.logits import BlockLogits
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.blocks import split_blocks
from permllm.training.masked_linear import MaskedLinear
from permllm.training.scores import Scores
from tests.permutation.differentiable import sinkhorn

Variant = Literal["hard", "soft"]


def dense_permutation(base: Tensor, blocks: list[Tensor]) -> Tensor:
    """`P[base[b B + i], b B + j] = blocks[b][i, j]`: one dense C x C matrix, differentiable in the blocks."""
    local = torch.block_diag(*[block for stack in blocks for block in stack])
    placed = torch.zeros_like(local)
    return placed.index_put((base,), local)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard.detach() + soft - soft.detach()


def dense_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saliency: Tensor,
    soft: Tensor,
    hard: Tensor,
    pattern: NMPattern,
    variant: Variant,
) -> Tensor:
    """The method's formula with dense matrices."""
    p = straight_through(hard, soft)
    permuted = saliency @ p
    groups = permuted.unflatten(1, (-1, pattern.m))
    soft_mask = groups.softmax(-1).flatten(1)
    kept = (
        torch.zeros_like(groups).scatter_(2, groups.topk(pattern.n, dim=2).indices, 1.0).flatten(1)
    )
    if variant == "hard":
        mask = straight_through(kept, soft_mask) @ p.T
    else:
        mask = straight_through(kept @ hard.T, soft_mask @ p.T)
    return nn.functional.linear(x, weight * mask, bias)


@pytest.mark.parametrize("variant", ["hard", "soft"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("form", ["one term", "two terms", "dense"])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_the_dense_formula(
    variant: Variant, n: int, m: int, power: int, form: str, bias: bool
) -> None:
    rows, channels, block_size = 10, 40, 16  # two blocks of 16 and one of 8
    generator = torch.Generator().manual_seed(n * m + power)
    linear = nn.Linear(channels, rows, bias=bias, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    terms = {"one term": 1, "two terms": 2, "dense": rows}[form]
    factors = SaliencyFactors(
        power,
        torch.rand(terms, channels, generator=generator, dtype=torch.float64) + 0.5,
        torch.rand(terms, rows, generator=generator, dtype=torch.float64) + 0.5
        if form == "two terms"
        else None,
    )
    assert factors.dense == (form == "dense")
    base = torch.randperm(channels, generator=generator)
    start = [
        torch.randn(stack.count, stack.size, stack.size, generator=generator, dtype=torch.float64)
        for stack in split_blocks(channels, block_size)
    ]
    x = torch.randn(3, 7, channels, generator=generator, dtype=torch.float64)
    grad = torch.randn(3, 7, rows, generator=generator, dtype=torch.float64)

    logits = BlockLogits(
        base, split_blocks(channels, block_size), [stack.clone() for stack in start]
    )
    module = MaskedLinear(linear, Scores(factors), NMPattern(n, m), logits.stacks, variant)
    soft = [sinkhorn(stack, 0.7, 3) for stack in logits.effective()]
    hard = torch.cat([perm.flatten() for perm in harden(soft)])
    perm = logits.order(hard)
    module.set_order(perm, hard, soft)
    ours_x = x.clone().requires_grad_()
    ours = module(ours_x)
    ours.backward(grad)

    reference = [stack.clone().requires_grad_() for stack in start]
    reference_x = x.clone().requires_grad_()
    soft_matrix = dense_permutation(base, [sinkhorn(stack, 0.7, 3) for stack in reference])
    hard_matrix = torch.zeros(channels, channels, dtype=torch.float64)
    hard_matrix[perm, torch.arange(channels)] = 1.0
    factor = (
        factors.column if factors.row is None else factors.row.T @ factors.column
    )  # of one term: for all rows
    saliency = linear.weight.abs() ** power * factor
    expected = dense_output(
        reference_x,
        linear.weight,
        linear.bias,
        saliency,
        soft_matrix,
        hard_matrix,
        NMPattern(n, m),
        variant,
    )
    expected.backward(grad)

    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert ours_x.grad is not None
    torch.testing.assert_close(ours_x.grad, reference_x.grad, rtol=1e-10, atol=1e-10)
    for parameter, stack in zip(logits.logits, reference, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, stack.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dense", [False, True])
def test_the_gradient_of_an_exchange_reaches_the_logits_of_its_channel_and_group(
    dense: bool,
) -> None:
    """Against the definition: a linear loss after each exchange, and Sinkhorn by itself."""
    rows, channels, size, pattern = 5, 24, 16, NMPattern(2, 4)  # a block of 16 and one of 8
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(channels, rows, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, channels, generator=generator, dtype=torch.float64))
    base = torch.randperm(channels, generator=generator)
    start = [
        torch.randn(stack.count, stack.size, stack.size, generator=generator, dtype=torch.float64)
        for stack in split_blocks(channels, size)
    ]
    x = torch.randn(9, channels, generator=generator, dtype=torch.float64)
    grad = torch.randn(9, rows, generator=generator, dtype=torch.float64)
    logits = BlockLogits(base, split_blocks(channels, size), [stack.clone() for stack in start])
    factor = (
        torch.rand(rows if dense else 1, channels, generator=generator, dtype=torch.float64) + 0.5
    )
    module = MaskedLinear(
        linear, Scores(SaliencyFactors(1, factor)), pattern, logits.stacks, "swap"
    )
    soft = [sinkhorn(stack, 0.7, 3) for stack in logits.effective()]
    hard = torch.cat([perm.flatten() for perm in harden(soft)])
    order = logits.order(hard)
    module.set_order(order, hard, soft)
    module(x).backward(grad)

    slope = (grad.T @ x) * linear.weight  # of the loss by each entry of the mask
    score = linear.weight.abs() * factor

    def loss(members: list[int]) -> float:
        kept = score[:, members].topk(min(pattern.n, len(members)), dim=1).indices
        return float(slope[:, members].gather(1, kept).sum())

    for index, stack in enumerate(split_blocks(channels, size)):
        expected = torch.zeros(1, stack.size, stack.size, dtype=torch.float64)
        for source in range(stack.size):
            channel = int(base[stack.start + source])
            for position in range(stack.size):
                first = stack.start + position // pattern.m * pattern.m
                group = order[first : first + pattern.m].tolist()
                if channel in group:
                    change = loss(group) - loss([member for member in group if member != channel])
                else:
                    rests = [[member for member in group if member != leaving] for leaving in group]
                    change = sum(loss([*rest, channel]) - loss(rest) for rest in rests) / pattern.m
                expected[0, source, position] = change
        reference = start[index].clone().requires_grad_()
        (sinkhorn(reference, 0.7, 3) * expected).sum().backward()
        torch.testing.assert_close(
            logits.logits[index].grad, reference.grad, rtol=1e-10, atol=1e-12
        )


def test_the_scale_of_the_paper_start_is_learned_and_clamped_with_a_gradient_that_passes() -> None:
    logits = BlockLogits(
        torch.arange(8), split_blocks(8, 8), [torch.full((1, 8, 8), 0.3) + torch.eye(8)], scale=2.0
    )
    soft = [sinkhorn(stack, 1.0, 2) for stack in logits.effective()]
    expected = sinkhorn((torch.full((1, 8, 8), 0.3) + torch.eye(8)).mul(2).clamp(-1, 1), 1.0, 2)
    torch.testing.assert_close(soft[0], expected)
    weight = torch.randn(8, 8)
    (soft[0] * weight).sum().backward()
    scale = torch.tensor(2.0, requires_grad=True)
    start = (torch.full((1, 8, 8), 0.3) + torch.eye(8)).requires_grad_()
    used = start * scale
    (sinkhorn(used + (used.clamp(-1, 1) - used).detach(), 1.0, 2) * weight).sum().backward()
    assert logits.scale is not None
    torch.testing.assert_close(logits.scale.grad, scale.grad)
    torch.testing.assert_close(logits.logits[0].grad, start.grad)
    assert start.grad is not None
    assert (
        start.grad[:, torch.arange(8), torch.arange(8)].abs().min() > 0
    )  # of the logits at the bound


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [(576, 64, [(0, 9, 64)]), (576, 128, [(0, 4, 128), (512, 1, 64)]), (32, 64, [(0, 1, 32)])],
)
def test_blocks_cover_the_channels(
    channels: int, size: int, expected: list[tuple[int, int, int]]
) -> None:
    assert [
        (stack.start, stack.count, stack.size) for stack in split_blocks(channels, size)
    ] == expected
