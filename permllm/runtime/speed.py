"""How fast a device multiplies and is filled, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

# Seconds that a measurement goes on for, and the shapes of a product: tokens, and channels of a layer.
_LONG_ENOUGH, _TOKENS, _CHANNELS = 0.2, 512, 2048
_BYTES = 1 << 26


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of the size of a layer's."""
    left = torch.ones(_TOKENS, _CHANNELS, dtype=dtype, device=device)
    weight = torch.ones(_CHANNELS, _CHANNELS, dtype=dtype, device=device)
    return 2 * _TOKENS * _CHANNELS**2 * _times_a_second(lambda: nn.functional.linear(left, weight), device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second from pinned host memory to a CUDA device."""
    source = torch.empty(_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    return _BYTES * _times_a_second(lambda: target.copy_(source, non_blocking=True), device)


def _times_a_second(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()  # what the first time alone does
    wait()
    count, done, begun = 1, 0, time.perf_counter()
    while True:
        for _ in range(count):
            work()
        wait()
        done, count = done + count, 2 * count
        taken = time.perf_counter() - begun
        if taken >= _LONG_ENOUGH:
            return done / taken
