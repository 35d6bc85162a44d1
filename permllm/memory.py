"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


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
