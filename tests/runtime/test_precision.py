"""Products are rounded inside of `products_in` and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from permllm.permutation.foldable import split_blocks
from permllm.permutation.lcp.permutation_linear import PermutationLinear
from permllm.permutation.lcp.sinkhorn import BlockLogits
from permllm.runtime import precision
from permllm.runtime.precision import compute_dtype, products_in, working_dtype
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training.losses import loss_named
from tests.conftest import tiny_model
from tests.problems import CPU, sinkhorn, tokens


@pytest.mark.parametrize(
    ("setting", "native", "weights", "found"),
    [
        ("auto", True, "float32", "bfloat16"),
        ("auto", False, "float32", "float32"),
        ("float32", True, "float32", "float32"),
        ("bfloat16", False, "float32", "bfloat16"),
        ("auto", True, "float64", "float64"),
        ("bfloat16", True, "float16", "float16"),
    ],
)
def test_only_float32_is_rounded(
    setting: str, native: bool, weights: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: native)
    assert compute_dtype(setting, getattr(torch, weights), CPU) == getattr(torch, found)


def masked(linear: nn.Linear) -> tuple[PermutationLinear, BlockLogits]:
    """Return a linear of 32 channels that follows an order, and the logits of the order."""
    logits = BlockLogits(torch.randperm(32), split_blocks(32, 16), [torch.randn(2, 16, 16)])
    factors = SaliencyFactors(1, torch.ones(1, 32))
    return PermutationLinear(linear, factors, NMPattern(2, 4), logits.stacks), logits


def follow(module: PermutationLinear, logits: BlockLogits) -> None:
    softs = [sinkhorn(logits.effective(0), 1.0, 5)]
    module.set_permutation(logits.base, torch.arange(16).repeat(2), softs)


def test_a_masked_linear_rounds_the_factors_of_products_and_not_its_mask() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 24).requires_grad_(False)
    # Weights that bfloat16 cannot tell apart: rounded first, the mask would be another.
    linear.weight.copy_(1.0 + torch.rand(24, 32) / 1024)
    module, logits = masked(linear)
    x, grad = torch.randn(40, 32), torch.randn(40, 24)
    mask = permuted_nm_mask(linear.weight, logits.base, NMPattern(2, 4))
    weight, grads = (linear.weight * mask).bfloat16().double(), []
    for dtype in (torch.float32, torch.bfloat16):
        with products_in(dtype, CPU):
            logits.zero_grad()
            follow(module, logits)
            inputs = x.clone().requires_grad_()
            y = module(inputs)
            y.backward(grad.to(y.dtype))
        assert y.dtype == dtype
        assert logits.logits[0].grad is not None
        assert inputs.grad is not None
        assert inputs.grad.dtype == logits.logits[0].grad.dtype == torch.float32
        grads.append(logits.logits[0].grad.flatten())
    # Rounded to 8 bits, once as a product and once with the bias.
    exact = x.bfloat16().double() @ weight.T + linear.bias.double()
    bound = 2**-7 * float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=bound)
    exact = grad.bfloat16().double() @ weight
    torch.testing.assert_close(inputs.grad.double(), exact, rtol=2**-8, atol=1e-6)
    assert torch.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_saliency_of_two_terms_is_not_rounded(dtype: torch.dtype) -> None:
    """RIA's: what learns has the masks that the pruner makes outside."""
    weight = torch.randn(24, 32)
    factors = SaliencyFactors(1, torch.rand(2, 32), torch.rand(2, 24))
    assert factors.row is not None
    exact = weight.double().abs() * (factors.row.double().T @ factors.column.double())
    with products_in(dtype, CPU):
        found = saliency(weight, factors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_the_divergence_is_taken_in_float32_of_rounded_products() -> None:
    model = tiny_model("llama")
    target = torch.randn(2, 5, 32)
    output = (target + 0.3 * torch.randn(2, 5, 32)).requires_grad_()
    loss = loss_named("kl", model, 10, compile_=False)
    exact = loss(output, target, tokens(2, 5))
    (exact_grad,) = torch.autograd.grad(exact, output)
    with products_in(torch.bfloat16, CPU):
        rounded = loss(output, target, tokens(2, 5))
        (grad,) = torch.autograd.grad(rounded, output)
    assert rounded.dtype == grad.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    assert torch.cosine_similarity(grad.flatten(), exact_grad.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("native", [True, False])
def test_a_model_computes_in_float32_where_a_cpu_is_slow_in_its_dtype(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: native)
    own = {torch.float32: True, torch.bfloat16: native, torch.float16: False}
    for dtype, stays in own.items():
        assert working_dtype(dtype, CPU) == (dtype if stays else torch.float32)
        assert working_dtype(dtype, torch.device("cuda")) == dtype


def test_other_products_stay_as_they_are() -> None:
    a, weight = torch.randn(4, 8), torch.randn(6, 8)
    for dtype in (torch.float32, torch.float64):
        with products_in(dtype, CPU):
            assert torch.equal(nn.functional.linear(a, weight), a @ weight.T)
            assert (a @ a.T).dtype == torch.float32
    with products_in(torch.bfloat16, CPU):
        assert nn.functional.linear(a, weight).dtype == torch.bfloat16
