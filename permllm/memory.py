"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

# mallopt(3): what is freed above the top of the heap before it goes back, and from which size on memory is mapped.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Let the GNU C library keep memory that is freed for the next tensor, instead of returning it to the system.

    Otherwise each temporary tensor is mapped and filled with zeros anew, a quarter of a step's time on a CPU. Nothing happens
    elsewhere, or where the environment has settings of its own (`MALLOC_...`).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, so that each job of a sweep in one process reports its own (Linux; elsewhere no effect)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_host_memory() -> int:
    """Largest resident size of this process since `reset_peak_memory`, bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> int:
    """Peak memory where the model lives, bytes: of the CUDA allocator on a GPU, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_memory()
