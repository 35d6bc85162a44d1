"""Memory of host and device: free bytes, peaks, copies between the two."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor

# Settings of mallopt(3): the size from which on memory is mapped, and free memory above the heap
# that is not returned.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Bytes of a tensor whose memory is kept: tensors of many sizes leave gaps behind that no other one
# fits in.
USUAL, SPARING = 32 << 20, 1 << 20
# The folder where a control group says what a container may take, and has taken.
_GROUP = Path("/sys/fs/cgroup")


def keep_freed_memory(largest: int = USUAL) -> None:
    """Let the GNU C library keep freed memory for the next tensor.

    Otherwise each temporary tensor is mapped and filled with zeros anew, a quarter of a step's time
    on a CPU. Nothing happens where the environment has settings of its own (`MALLOC_...`).

    Args:
        largest: bytes of a tensor whose memory is kept: `USUAL`, or `SPARING` where little memory
            is to be taken.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        _gnu("mallopt", _M_MMAP_THRESHOLD, largest)
        _gnu("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return freed memory to the system: tensors of another kind may find no place in it."""
    _gnu("malloc_trim", 0)


def _gnu(function: str, *arguments: int) -> None:
    """Call a function of the GNU C library; nothing happens with another library."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks: each job of a sweep in one process reports its own (on Linux alone)."""
    if device.type == "cuda":
        torch.cuda.init()  # before it the allocator knows no device
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def host_memory() -> int:
    """Return the resident size of this process now, bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_host_memory() -> int:
    """Return the largest resident size of this process since `reset_peak_memory`, bytes."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> int:
    """Return the peak memory, bytes: of the CUDA allocator on a GPU, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_memory()


def free_memory(device: torch.device) -> int:
    """Return the bytes that new tensors can take on a CUDA device now."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available_host_memory() -> int:
    """Return the bytes that the system, and the control group of a container, leave a process."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # without a group, or a limit
        most = int((_GROUP / "memory.max").read_text())
        taken = int((_GROUP / "memory.current").read_text())
        # Pages of files that were read count as taken, and make room for whatever is asked for.
        pages = re.findall(r"active_file (\d+)\n", (_GROUP / "memory.stat").read_text())
        available = min(available, most - taken + sum(map(int, pages)))
    return max(0, available)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device; a GPU reads pinned memory while the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, through pinned memory from a GPU; wait until it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copied
