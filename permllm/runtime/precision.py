"""Dtype of matrix products before the evaluation: mixed precision with `torch.autocast`.

Only matrix products are rounded. Weights, logits, optimizer, norms, softmax and loss keep their
dtype. On a CPU with bfloat16 instructions products take a quarter of the time of float32. On other
CPUs a run computes with a half-precision model in float32 (`working_dtype`).
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


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


def working_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a model computes on a device: float32 where its own is slow.

    torch multiplies half-precision matrices many times slower than float32 ones on a CPU without
    instructions for them.

    Args:
        weights: dtype of the model.
        device: device of the model.
    """
    slow = device.type == "cpu" and (
        weights == torch.float16 or (weights == torch.bfloat16 and not multiplies_bfloat16(device))
    )
    return torch.float32 if slow else weights


def products_as_they_are(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that computes products in the dtype of their factors."""
    return torch.autocast(tensor.device.type, enabled=False)


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that computes matrix products in `dtype`, if it is a half-precision one."""
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, enabled=False)
    # A cache would keep the rounded copy of a weight after the optimizer has changed the weight.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of products with a tensor: that of `products_in`, or the tensor's own."""
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
