"""Memory: what is free, what was taken at most, and the way between the host's and the device's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor

# mallopt(3): what is freed above the top of the heap before it goes back, and from which size on memory is mapped.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MAP_THRESHOLD = 32 << 20
# Where weights are read from files, in which one takes little memory on purpose.
SPARING = 1 << 20
# Where a control group says what a container may take, has taken, and has of that in pages of files, which make room.
_GROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


def keep_freed_memory(largest: int = _LARGEST_MAP_THRESHOLD) -> None:
    """Let the GNU C library keep memory that is freed for the next tensor, instead of returning it to the system.

    Otherwise each temporary tensor is mapped and filled with zeros anew, a quarter of a step's time on a CPU. Nothing happens
    elsewhere, or where the environment has settings of its own (`MALLOC_...`).

    Args:
        largest: bytes of a tensor whose memory is kept. Tensors of many sizes leave room behind that no other one fits in:
            `SPARING` where little memory is to be taken.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, largest)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give back what the GNU C library keeps of freed memory: tensors of another kind may find no place in it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, so that each job of a sweep in one process reports its own (Linux; elsewhere no effect)."""
    if device.type == "cuda":
        torch.cuda.init()  # before it the allocator knows no device
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def host_memory() -> int:
    """Resident size of this process now, bytes."""
    return int(psutil.Process().memory_info().rss)


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


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take on a CUDA device now: what is free, and what the allocator holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available_host_memory() -> int:
    """Bytes that this process can still take on the host: what the system has free, or its control group allows."""
    available = psutil.virtual_memory().available
    for limit, used, parts, of_files in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # without a group, or a limit
            most, taken = (int((_GROUP / name).read_text()) for name in (limit, used))
            lines = map(str.split, (_GROUP / parts).read_text().splitlines())
            available = min(available, most - taken + sum(int(size) for name, size in lines if name in of_files))
    return max(0, available)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`. Through pinned memory to a GPU, so that the host does not wait for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the host, through pinned memory from a GPU; waits until it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copied
