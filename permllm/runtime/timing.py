"""Seconds of a call, over as many calls as it takes to be seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

# Shorter than this the clock, the first launch and the last wait are a part of what is measured.
_LEAST_SECONDS = 0.02


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


def interleaved(works: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of a call of each, in turns, each measured over enough calls, at most a thousand.

    Two turns do not count: the first compiles and allocates, the second says how many calls are enough.
    """
    for work in works.values():
        work()
    once = {name: clock(work, device) for name, work in works.items()}
    calls = {name: math.ceil(min(max(_LEAST_SECONDS / max(seconds, 1e-9), 1), 1000)) for name, seconds in once.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work, device, calls[name]))
    return times
