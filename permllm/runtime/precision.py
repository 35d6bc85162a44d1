"""The number format of the model's matrix products up to the evaluation: mixed precision by `torch.autocast`.

Weights, logits, optimizer, norms, softmax and loss keep their own format; only what multiplies matrices is rounded. On a CPU
that multiplies bfloat16 natively the products take a quarter of the time of float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def compute_dtype(setting: str, weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The format of products.

    Args:
        setting: `auto` rounds float32 to bfloat16 where the device multiplies it natively, `bfloat16` does so anywhere,
            `float32` nowhere.
        weights: dtype of the model. Weights in another format than float32 are multiplied as they are.
        device: where the model is.
    """
    if weights != torch.float32 or setting == "float32" or (setting == "auto" and not multiplies_bfloat16(device)):
        return weights
    return torch.bfloat16


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products inside are made in `dtype` where it is narrower than float32; otherwise nothing changes."""
    # Without the cache: it would keep the rounded copy of a weight that an optimizer has changed since.
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if narrow else torch.bfloat16, enabled=narrow, cache_enabled=False)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The format that a product with `tensor` is made in here: autocast's inside of `products_in`, else the tensor's own."""
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
