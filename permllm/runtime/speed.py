"""Seconds of a call, and speed of a device: nominal for a named card, else measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from permllm.runtime.precision import half_products

# In less time the clock, the first launch and the last wait are a part of the measurement.
_LEAST_SECONDS = 0.02
# Nominal TFLOP/s of dense products in bfloat16 and in float32, GB/s and GB of memory.
CARDS = {
    "l4": (121, 30, 300, 24),
    "l40s": (362, 92, 864, 48),
    "rtx4090": (165, 83, 1008, 24),
    "a100": (312, 19.5, 2039, 80),
    "h100": (989, 67, 3350, 80),
    "h200": (989, 67, 4800, 141),
    "b200": (2250, 75, 8000, 180),
}
# Share of the nominal speed that is reached.
_SHARE = 0.6


class Speed(NamedTuple):
    """Operations a second of products by their dtype, and bytes that move a second."""

    rates: dict[torch.dtype, float]
    moved: float


def speed_of(card: str | None, device: torch.device, dtypes: Collection[torch.dtype]) -> Speed:
    """Return the speed of a card for products in each dtype; None measures the device."""
    if card:
        half, single, moved, _ = CARDS[card]
        nominal = {dtype: half if dtype.itemsize == 2 else single for dtype in dtypes}
        rates = {dtype: _SHARE * 1e12 * rate for dtype, rate in nominal.items()}
        return Speed(rates, _SHARE * 1e9 * moved)
    size = 1024 if device.type == "cpu" else 8192
    square = torch.ones(size, size, device=device)
    works: dict[Any, Any] = {"copy": square.clone}
    for dtype in dtypes:
        works[dtype] = partial(nn.functional.linear, square.to(dtype), square.to(dtype))
    with half_products(torch.bfloat16, device):
        times: dict[Any, list[float]] = interleaved(works, 3, device)
    rates = {dtype: 2 * size**3 / min(times[dtype]) for dtype in dtypes}
    return Speed(rates, 2 * square.nbytes / min(times["copy"]))


def clock(work: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of so many calls in a row, from an idle GPU to an idle GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls


def interleaved(
    works: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of a call of each work, in turns, each measured over enough calls.

    Two turns do not count: the first compiles and allocates, the second says how many calls are
    enough, at most a thousand.
    """
    for work in works.values():
        work()
    calls = {}
    for name, work in works.items():
        once = max(clock(work, device), 1e-9)
        calls[name] = math.ceil(min(max(_LEAST_SECONDS / once, 1), 1000))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work, device, calls[name]))
    return times
