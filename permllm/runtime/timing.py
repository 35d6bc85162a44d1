"""Seconds of a call: by a GPU's own clock where there is one, over as many calls as it takes to be seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

# Shorter than this the clock, the first launch and the last wait are a part of what is measured.
_LEAST_SECONDS = 0.02
_MOST_CALLS = 1000


def clock(work: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Mean seconds of so many calls in a row: between two events in the stream of a CUDA device, else of wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)  # which need not be of the device that the process is on
        first.record(stream)
        for _ in range(calls):
            work()
        last.record(stream)
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls
    started = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - started) / calls


def calls_to_be_seen(seconds: float) -> int:
    """How many calls of so many seconds make a measurement that is long enough, at most a thousand."""
    return min(_MOST_CALLS, max(1, math.ceil(_LEAST_SECONDS / max(seconds, 1e-9))))


def interleaved(works: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a call of each, in turns, each measured over enough calls; after two turns that do not count.

    The first turn compiles and allocates, the second says how many calls are enough.
    """
    for work in works.values():
        work()
    calls = {name: calls_to_be_seen(clock(work, device)) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work, device, calls[name]))
    return times
