"""Rounding of FP8 kernels: values beside a list of all codes and beside torchao, whole models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from permllm.evaluation.fp8 import fp8_products, rounded
from permllm.models.families import channel_groups, linear_at
from permllm.models.load import load_model
from tests.settings.test_config import config

# The numbers of e4m3 from its definition: 4 bits of exponent with bias 7, 3 bits of fraction; the
# last code, of all ones, is no number.
POSITIVE = [
    math.ldexp(fraction / 8 + (exponent > 0), max(exponent, 1) - 7)
    for exponent in range(16)
    for fraction in range(8)
][:-1]


def nearest(value: float) -> float:
    """Return the e4m3 number that is nearest, of two the one with an even last bit."""
    distances = [abs(abs(value) - code) for code in POSITIVE]
    least = min(distances)
    codes = [index for index, distance in enumerate(distances) if distance == least]
    return math.copysign(POSITIVE[min(codes, key=lambda code: code % 2)], value)


def by_formula(values: Tensor) -> Tensor:
    """Return the rounded values in float64, a number at a time."""
    rows = []
    for row in values.bfloat16().double().tolist():
        largest = torch.tensor(max(map(abs, row)) / 448, dtype=torch.float64)
        scale = float(largest.float().bfloat16()) or 1.0
        codes = [nearest(max(-448.0, min(448.0, value / scale))) for value in row]
        rows.append([code * scale for code in codes])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def values() -> Tensor:
    torch.manual_seed(0)
    rows = torch.randn(24, 64) * torch.logspace(-3, 3, 24)[:, None]
    rows[3] = 0
    rows[4, 1:] = 1e-6  # below the smallest code of a row with a large value
    rows[5] = torch.cat([torch.tensor([448.0]), torch.arange(63) / 16 + 16])  # ties
    return rows


def test_rounding_is_to_the_nearest_code_with_a_scale_for_each_row(values: Tensor) -> None:
    assert torch.equal(rounded(values).double(), by_formula(values))
    assert torch.equal(rounded(values[None]), rounded(values)[None])


def test_rounding_is_that_of_torchao(values: Tensor) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    preference = pytest.importorskip("torchao.quantization.quantize_.common").KernelPreference.TORCH
    whole = values[values.any(1)].bfloat16()  # torchao divides a row of zeros by zero
    options = {"granularity": torchao.PerRow(), "kernel_preference": preference}
    theirs = torchao.Float8Tensor.from_hp(whole, **options)
    assert torch.equal(theirs.dequantize(torch.float32), rounded(whole))


def test_linears_multiply_rounded_weights_and_activations_inside_the_context() -> None:
    model = load_model(config("model=tiny-random").model, 0).model
    paths = [path for group in channel_groups(model) for path in group.members]
    linear, weights = linear_at(model, paths[0]), [linear_at(model, path).weight for path in paths]
    before, states = [weight.clone() for weight in weights], torch.randn(2, 3, linear.in_features)
    with fp8_products(model):
        product = linear(states)
        logits = model(input_ids=torch.arange(8)[None]).logits
    x, w = by_formula(states.flatten(0, 1)), by_formula(linear.weight.detach())
    torch.testing.assert_close(product.double().flatten(0, 1), x @ w.T, rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits, model(input_ids=torch.arange(8)[None]).logits)
    assert all(map(torch.equal, weights, before))
    assert "forward" not in vars(linear)
