"""How fast a device multiplies and is filled, measured in a moment."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import nn

from permllm.runtime.precision import half_products
from permllm.runtime.timing import interleaved

# Measurements, and the shapes of a product: tokens, and channels of a layer.
_REPEATS, _TOKENS, _CHANNELS = 3, 512, 2048
_BYTES = 1 << 26


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of the size of a layer's."""
    left = torch.ones(_TOKENS, _CHANNELS, dtype=dtype, device=device)
    weight = torch.ones(_CHANNELS, _CHANNELS, dtype=dtype, device=device)
    with half_products(dtype, device):
        return 2 * _TOKENS * _CHANNELS**2 / _seconds(lambda: nn.functional.linear(left, weight), device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second from pinned host memory to a CUDA device."""
    source = torch.empty(_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    return _BYTES / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    return statistics.median(interleaved({"work": work}, _REPEATS, device)["work"])
