"""Scores that learn: their gradients against autograd of the whole formula, and what they start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.runtime.precision import products_in
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training.masked_linear import MaskedLinear
from permllm.training.scores import FreeScores, LowRankScores, Scores

ROWS, CHANNELS, PATTERN = 6, 24, NMPattern(2, 4)


def given(form: str = "one term", seed: int = 0) -> tuple[nn.Linear, SaliencyFactors, Tensor]:
    """A linear with a weight that is zero, its factors, and an order."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(CHANNELS, ROWS, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(torch.randn(ROWS, CHANNELS, generator=generator, dtype=torch.float64))
    linear.weight[1, 3] = 0.0
    terms = {"one term": 1, "two terms": 2, "dense": ROWS, "dense, without the weight": ROWS}[form]
    column = torch.rand(terms, CHANNELS, generator=generator, dtype=torch.float64) + 0.5
    row = (
        torch.rand(2, ROWS, generator=generator, dtype=torch.float64) + 0.5
        if form == "two terms"
        else None
    )
    power = 0 if form == "dense, without the weight" else 1
    return (
        linear,
        SaliencyFactors(power, column, row),
        torch.randperm(CHANNELS, generator=generator),
    )


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
        values = scores.values_t(linear.weight.t()).t()
        torch.testing.assert_close(
            values.exp(), expected.clamp_min(torch.finfo(torch.float64).tiny), rtol=1e-11, atol=0
        )
        assert torch.equal(
            permuted_nm_mask(values, order, PATTERN), permuted_nm_mask(expected, order, PATTERN)
        )
    assert torch.equal(saliency(linear.weight, factors), expected)


def test_scores_have_a_channel_in_a_row_whatever_the_weight_is_like() -> None:
    """Processes add up what is contiguous, and channels are gathered."""
    linear, factors, _ = given()
    for weight in (linear.weight.data.contiguous(), linear.weight.data.t().contiguous().t()):
        assert FreeScores(weight, factors).free.is_contiguous()


def test_rounded_products_of_an_order_lose_what_rounding_loses_and_no_more() -> None:
    linear, factors, order = given()
    linear = linear.float()
    there = nn.Linear(CHANNELS, ROWS).requires_grad_(False)
    there.weight.data, there.bias = linear.weight.data.t()[order].t(), linear.bias
    narrow = SaliencyFactors(1, factors.column.float())
    scores = FreeScores(there.weight, narrow.permuted(order))
    module = MaskedLinear(there, scores, PATTERN, order=order)
    x, grad = torch.randn(5, CHANNELS), torch.randn(5, ROWS)
    inputs = x.clone().requires_grad_()
    with products_in(torch.bfloat16, torch.device("cpu")):
        y = module(inputs)
        y.backward(grad.to(y.dtype))
    x, grad = x.bfloat16().double(), grad.bfloat16().double()
    masked = (
        (linear.weight * permuted_nm_mask(saliency(linear.weight, narrow), order, PATTERN))
        .bfloat16()
        .double()
    )
    groups = (x.T @ grad * linear.weight.T.double())[order].unflatten(0, (-1, PATTERN.m))
    exact = {
        "output": (y, x @ masked.T + linear.bias.double()),
        "input": (inputs.grad, grad @ masked),
        "scores": (scores.free.grad, (groups - groups.mean(1, keepdim=True)).flatten(0, 1)),
    }
    for name, (found, expected) in exact.items():
        assert found is not None
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            found.double(), expected, rtol=2**-7, atol=2**-7 * largest, msg=name
        )
    assert y.dtype == torch.bfloat16
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.float32


@pytest.mark.parametrize("form", ["one term", "dense"])
@pytest.mark.parametrize("kind", ["free", "lowrank"])
def test_output_and_gradients_equal_the_dense_formula(kind: str, form: str) -> None:
    linear, factors, order = given(form)
    scores = made(kind, linear, factors)
    generator = torch.Generator().manual_seed(1)
    for parameter in scores.parameters():  # away from the start
        parameter.data += 0.3 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    x = torch.randn(5, CHANNELS, generator=generator, dtype=torch.float64)
    grad = torch.randn(5, ROWS, generator=generator, dtype=torch.float64)
    ours_x = x.clone().requires_grad_()
    there = nn.Linear(CHANNELS, ROWS, dtype=torch.float64).requires_grad_(False)
    there.weight.data, there.bias = linear.weight.data.t()[order].t(), linear.bias
    moved = made(kind, there, factors.permuted(order))
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            values = getattr(scores, name)
            parameter.copy_(values if name == "left" else values[order])
    ordered = MaskedLinear(there, moved, PATTERN, order=order)
    ours = ordered(ours_x)
    ours.backward(grad)
    for name, parameter in scores.named_parameters():
        found = getattr(moved, name).grad
        parameter.grad = found if name == "left" else found[order.argsort()]
    assert torch.equal(
        ordered.mask(), permuted_nm_mask(scores.values_t(linear.weight.t()).t(), order, PATTERN)
    )

    base = saliency(linear.weight, factors).clamp_min(torch.finfo(torch.float64).tiny).log()
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
    for parameter, leaf in zip(scores.parameters(), leaves, strict=True):
        torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-10, atol=1e-12)
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-3
