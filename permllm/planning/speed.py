"""Seconds of a call, and speed of a device: nominal for the name of a card, or else measured."""

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn

# Operations per second of a device, by dtype.
Speed = dict[torch.dtype, float]

# For each card: nominal TFLOP/s of dense products in bfloat16 and float32, and GB of memory.
CARDS = {
    "l4": (121, 30, 24),
    "l40s": (362, 92, 48),
    "rtx4090": (165, 83, 24),
    "a100": (312, 19.5, 80),
    "h100": (989, 67, 80),
    "h200": (989, 67, 141),
    "b200": (2250, 75, 180),
}
# Share of the nominal speed that we expect.
_SHARE = 0.6


def speed_of(card: str | None, device: torch.device, dtypes: Collection[torch.dtype]) -> Speed:
    """Return the expected speed of a card for products in each dtype; None: measure the device."""
    speed = {}
    if card:
        half, single, _ = CARDS[card]
        for dtype in dtypes:
            speed[dtype] = _SHARE * 1e12 * (half if dtype.itemsize == 2 else single)
        return speed
    size = 1024 if device.type == "cpu" else 8192
    square = torch.ones(size, size, device=device)
    for dtype in dtypes:
        product = partial(nn.functional.linear, square.to(dtype), square.to(dtype))
        speed[dtype] = 2 * size**3 / _least_seconds(product, device)
    return speed


def _least_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of a few calls; the first call compiles and allocates."""
    work()
    return min(clock(work, device) for _ in range(4))


def clock(work: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of a call over `calls` calls, from an idle to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls
