"""Seconds of a call, and speed of a device: nominal for the name of a card, or else measured."""

import math
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from permllm.runtime.precision import half_products

# Shorter measurements would be distorted by the clock, the first launch and the last wait.
_LEAST_SECONDS = 0.02
# For each card: nominal TFLOP/s of dense products in bfloat16 and float32, GB/s and GB of memory.
CARDS = {
    "l4": (121, 30, 300, 24),
    "l40s": (362, 92, 864, 48),
    "rtx4090": (165, 83, 1008, 24),
    "a100": (312, 19.5, 2039, 80),
    "h100": (989, 67, 3350, 80),
    "h200": (989, 67, 4800, 141),
    "b200": (2250, 75, 8000, 180),
}
# Share of the nominal speed that we expect.
_SHARE = 0.6


class Speed(NamedTuple):
    """Speed of a device: operations per second by dtype, and bytes that are moved per second."""

    rates: dict[torch.dtype, float]
    moved: float


def speed_of(card: str | None, device: torch.device, dtypes: Collection[torch.dtype]) -> Speed:
    """Return the expected speed of a card for products in each dtype; None: measure the device."""
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
    """Return the mean seconds of a call over `calls` calls, from an idle to an idle device."""
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
    """Measure works in turns, and return the seconds of a call for each work and turn.

    A measurement takes as many calls, at most 1000, as need `_LEAST_SECONDS`. Two turns before do
    not count: the first compiles and allocates, the second finds the number of calls.
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
