"""Dtype of matrix products before the evaluation: mixed precision with `torch.autocast`.

Only matrix products are rounded. Weights, logits, optimizer, norms, softmax and loss keep their
dtype. On a CPU with bfloat16 instructions products take a quarter of the time of float32. On other
CPUs the products of a half-precision model use float32 (`half_products`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def compute_dtype(setting: str, weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of products.

    Args:
        setting: `auto` rounds float32 to bfloat16 on a device with bfloat16 instructions,
            `bfloat16` on any device, `float32` never.
        weights: dtype of the model. Only float32 is rounded.
        device: device of the model.
    """
    rounds = setting == "bfloat16" or (setting == "auto" and multiplies_bfloat16(device))
    return torch.bfloat16 if rounds and weights == torch.float32 else weights


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell if the device has instructions for products of bfloat16 matrices."""
    if device.type == "cuda":  # the cards of `plan_on`, which may not be here, have them
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def half_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context with faster half-precision linears on CPUs without instructions for them.

    They multiply in float32 and round the result once, several times faster than torch's own
    half-precision linears.

    Args:
        dtype: dtype of the model's weights.
        device: device of the model.
    """
    needed = device.type == "cpu" and (
        dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16(device))
    )
    return ThroughFloat32() if needed else nullcontext()


class ThroughFloat32(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Mode that computes half-precision `linear` and `product`, and their gradients, in float32."""

    entered = 0  # number of active modes, because backward does not see a mode

    def __enter__(self) -> Self:
        ThroughFloat32.entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        ThroughFloat32.entered -= 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and not kwargs and _both_half(args[0], args[1]):
            bias = args[2] if len(args) > 2 else None
            return _LinearThroughFloat32.apply(args[0], args[1], bias)
        return func(*args, **(kwargs or {}))


def recomputed(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function, and call it again in backward instead of keeping its activations."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=_modes)


def _modes() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of the first call, and of the call in backward, which sees no mode."""
    return nullcontext(), ThroughFloat32() if ThroughFloat32.entered else nullcontext()


_HALF = (torch.bfloat16, torch.float16)
# Numbers in the part of a weight that has a float32 copy at a time.
_PIECE = 1 << 24


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` of two matrices, without gradients, in float32 under the mode."""
    if ThroughFloat32.entered and _both_half(a, b):
        return _through_float32(a, b.t(), None)
    return a @ b


def _both_half(a: Tensor, b: Tensor) -> bool:
    """Tell if two tensors have the same half-precision dtype."""
    return a.dtype == b.dtype and a.dtype in _HALF


def _through_float32(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear` with float32 copies of parts of the weight."""
    wide = states.float()
    output = states.new_empty(*states.shape[:-1], len(weight))
    with products_as_they_are(states):
        for rows in _pieces(weight, states.numel() // states.shape[-1]):
            of_rows = None if bias is None else bias[rows].float()
            # The assignment rounds to the dtype of the output.
            output[..., rows] = nn.functional.linear(wide, weight[rows].float(), of_rows)
    return output


class _LinearThroughFloat32(torch.autograd.Function):
    """Autograd function of `_through_float32` that keeps half-precision tensors for backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states if weight.requires_grad else None, weight)
        return _through_float32(states, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        wide = gradient.float()
        dtype = gradient.dtype
        tokens = wide.flatten(0, -2)
        of_states = of_weight = None
        with products_as_they_are(gradient):
            if ctx.needs_input_grad[0]:
                parts = (wide[..., rows] @ weight[rows].float() for rows in _pieces(weight))
                of_states = sum(parts).to(dtype)
            if ctx.needs_input_grad[1]:
                of_weight = (tokens.t() @ states.flatten(0, -2).float()).to(dtype)
        return of_states, of_weight, tokens.sum(0).to(dtype) if ctx.needs_input_grad[2] else None


def products_as_they_are(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that computes products in the dtype of their factors."""
    return torch.autocast(tensor.device.type, enabled=False)


def _pieces(weight: Tensor, tokens: int = 1) -> list[slice]:
    """Split the rows of a weight so that a part and its outputs have at most `_PIECE` numbers."""
    count = max(1, _PIECE // max(weight.shape[1], tokens))
    return [slice(first, first + count) for first in range(0, len(weight), count)]


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that computes matrix products in `dtype`, if it is a half-precision one."""
    if dtype not in _HALF:
        return torch.autocast(device.type, enabled=False)
    # A cache would keep the rounded copy of a weight after the optimizer has changed the weight.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of products with a tensor: that of `products_in`, or the tensor's own."""
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
