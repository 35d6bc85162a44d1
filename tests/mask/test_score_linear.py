"""Scores that learn: their gradients against autograd of the whole formula, and their start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from permllm.mask.lowrank import LowRankScores
from permllm.mask.score import FreeScores
from permllm.mask.score_linear import ScoreLinear, Scores
from permllm.runtime.precision import products_in
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from tests.problems import random, shuffled

ROWS, CHANNELS, PATTERN = 6, 24, NMPattern(2, 4)
TINY = torch.finfo(torch.float64).tiny


def given(form: str) -> tuple[nn.Linear, SaliencyFactors, Tensor]:
    """Return a linear with a weight that is zero, its factors, and a permutation."""
    linear = nn.Linear(CHANNELS, ROWS, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(random(ROWS, CHANNELS, seed=0))
    linear.weight[1, 3] = 0.0
    terms = {"one term": 1, "two terms": 2}.get(form, ROWS)
    column = random(terms, CHANNELS, seed=1).abs() + 0.5
    row = random(2, ROWS, seed=2).abs() + 0.5 if form == "two terms" else None
    power = 0 if form == "dense, without the weight" else 1
    return linear, SaliencyFactors(power, column, row), shuffled(CHANNELS, seed=3)


def permuted(linear: nn.Linear, order: Tensor) -> nn.Linear:
    """Return the linear as learning stores it."""
    there = nn.Linear(CHANNELS, ROWS, dtype=linear.weight.dtype).requires_grad_(False)
    there.weight.data, there.bias = linear.weight.data.t()[order].t(), linear.bias
    return there


def made(kind: str, linear: nn.Linear, factors: SaliencyFactors) -> Scores:
    if kind == "free":
        return FreeScores(linear.weight, factors)
    return LowRankScores(linear.weight, factors, 3, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", ["one term", "two terms", "dense", "dense, without the weight"])
@pytest.mark.parametrize("kind", ["free", "lowrank"])
def test_they_start_at_the_masks_of_the_pruner(kind: str, form: str) -> None:
    linear, factors, order = given(form)
    expected = saliency(linear.weight, factors).clone()
    scores = made(kind, linear, factors)
    for _ in range(2):  # in each step anew
        values = saliency(linear.weight, scores.chunk_scores(linear.weight.t(), slice(None)))
        torch.testing.assert_close(values.exp(), expected.clamp_min(TINY), rtol=1e-11, atol=0)
        mask = permuted_nm_mask(values, order, PATTERN)
        assert torch.equal(mask, permuted_nm_mask(expected, order, PATTERN))
    assert torch.equal(saliency(linear.weight, factors), expected)


def test_scores_have_a_channel_in_a_row_whatever_the_weight_is_like() -> None:
    """Processes add up what is contiguous, and channels are gathered."""
    linear, factors, _ = given("one term")
    for weight in (linear.weight.data.contiguous(), linear.weight.data.t().contiguous().t()):
        assert FreeScores(weight, factors).free.is_contiguous()


def test_rounded_products_of_an_order_lose_what_rounding_loses_and_no_more() -> None:
    linear, factors, order = given("one term")
    linear, narrow = linear.float(), SaliencyFactors(1, factors.column.float())
    there = permuted(linear, order)
    scores = FreeScores(there.weight, narrow.permuted(order))
    module = ScoreLinear(there, scores, PATTERN, order)
    x, grad = random(5, CHANNELS, seed=4).float(), random(5, ROWS, seed=5).float()
    inputs = x.clone().requires_grad_()
    with products_in(torch.bfloat16, torch.device("cpu")):
        y = module(inputs)
        y.backward(grad.to(y.dtype))
    assert inputs.grad is not None
    assert (y.dtype, inputs.grad.dtype) == (torch.bfloat16, torch.float32)
    x, grad = x.bfloat16().double(), grad.bfloat16().double()
    mask = permuted_nm_mask(saliency(linear.weight, narrow), order, PATTERN)
    masked = (linear.weight * mask).bfloat16().double()
    groups = (x.T @ grad * linear.weight.T.double())[order].unflatten(0, (-1, PATTERN.m))
    exact = {
        "output": (y, x @ masked.T + linear.bias.double()),
        "input": (inputs.grad, grad @ masked),
        "scores": (scores.free.grad, (groups - groups.mean(1, keepdim=True)).flatten(0, 1)),
    }
    for name, (found, expected) in exact.items():
        assert found is not None
        largest = 2**-7 * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=largest, msg=name)


@pytest.mark.parametrize("form", ["one term", "dense"])
@pytest.mark.parametrize("kind", ["free", "lowrank"])
def test_output_and_gradients_equal_the_dense_formula(kind: str, form: str) -> None:
    linear, factors, order = given(form)
    scores = made(kind, linear, factors)
    for number, parameter in enumerate(scores.parameters()):  # away from the start
        parameter.data += 0.3 * random(*parameter.shape, seed=6 + number)
    x, grad = random(5, CHANNELS, seed=4), random(5, ROWS, seed=5)
    there = permuted(linear, order)
    moved = made(kind, there, factors.permuted(order))
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            values = getattr(scores, name)
            parameter.copy_(values if name == "left" else values[order])
    module = ScoreLinear(there, moved, PATTERN, order)
    ours_x = x.clone().requires_grad_()
    ours = module(ours_x)
    ours.backward(grad)
    values = saliency(linear.weight, scores.chunk_scores(linear.weight.t(), slice(None)))
    assert torch.equal(module.mask(), permuted_nm_mask(values, order, PATTERN))

    base = saliency(linear.weight, factors).clamp_min(TINY).log()
    leaves = [parameter.detach().clone().requires_grad_() for parameter in scores.parameters()]
    if kind == "free":
        values = leaves[0].t()
    else:
        channel, left, right = leaves
        values = base + channel + left @ right.t()
    hard = permuted_nm_mask(values.detach(), order, PATTERN).double()
    groups = values[:, order].unflatten(1, (-1, PATTERN.m))
    # From the mean of each group, which leaves every choice as it is.
    chosen_by = (groups - groups.mean(2, keepdim=True)).flatten(1)[:, order.argsort()]
    mask = hard + chosen_by - chosen_by.detach()  # straight through
    reference_x = x.clone().requires_grad_()
    expected = reference_x @ (linear.weight * mask).t() + linear.bias
    expected.backward(grad)

    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours_x.grad, reference_x.grad, rtol=1e-10, atol=1e-12)
    for (name, parameter), leaf in zip(moved.named_parameters(), leaves, strict=True):
        assert parameter.grad is not None
        found = parameter.grad if name == "left" else parameter.grad[order.argsort()]
        assert found.abs().max() > 1e-3
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)
