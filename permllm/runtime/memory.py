"""Memory of the host and the device: free bytes, peaks, copies between the two."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

# Settings of mallopt(3): free bytes on top of the heap that are not returned to the system, and the
# size from which memory is mapped.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Bytes of the largest tensor whose memory is kept. Kept memory has gaps, into which tensors of
# other sizes do not fit.
USUAL = 32 << 20
SPARING = 1 << 20
# Control groups of this process, and the folder of all control groups.
OWN_GROUPS = Path("/proc/self/cgroup")
ALL_GROUPS = Path("/sys/fs/cgroup")
# Files of a control group with the limit and the use of memory, in versions 2 and 1.
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def keep_freed_memory(largest: int = USUAL) -> None:
    """Let the GNU C library keep freed memory for the next tensor.

    Without it the system maps and clears memory for each temporary tensor, which takes a quarter of
    a step's time on a CPU. Variables `MALLOC_...` of the environment have priority.

    Args:
        largest: bytes of the largest tensor whose memory is kept: `USUAL`, or `SPARING` to use
            little memory.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        _gnu("mallopt", _M_MMAP_THRESHOLD, largest)
        _gnu("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return freed memory to the system, because other tensors may not fit into it."""
    _gnu("malloc_trim", 0)


def _gnu(function: str, *arguments: int) -> None:
    """Call a function of the GNU C library, or do nothing with another library."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, so that each job of a process reports its own (host: only on Linux)."""
    if device.type == "cuda":
        torch.cuda.init()  # the allocator needs it
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def host_memory() -> int:
    """Return the present resident size of this process, bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_host_memory() -> int:
    """Return the largest resident size of this process since `reset_peak_memory`, bytes."""
    with contextlib.suppress(OSError):
        match = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        if match:
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> int:
    """Return the peak memory, bytes: of the CUDA allocator on a GPU, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_memory()


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free for new tensors on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available_host_memory() -> int:
    """Return the bytes that are free in the system and in all control groups of this process.

    A container and a job of SLURM are control groups.
    """
    available = psutil.virtual_memory().available
    for folder in _control_groups():
        for limit, use in _LIMITS:
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
                free = int((folder / limit).read_text()) - int((folder / use).read_text())
                available = min(available, free + _cached_pages(folder))
    return max(0, available)


def _control_groups() -> Iterator[Path]:
    """Yield the folders of this process's control groups for memory, each with its parents."""
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                top = ALL_GROUPS / "memory" if controllers else ALL_GROUPS
                # A container may name a group that only its host has; `top` is then its own.
                folder = top / path.lstrip("/")
                yield folder
                yield from (above for above in folder.parents if above.is_relative_to(top))


def _cached_pages(folder: Path) -> int:
    """Return the bytes of files in memory, which count as used until the system needs memory."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    kinds = ("active_file", "inactive_file")
    return sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in kinds)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the host to a GPU without waiting, through pinned memory."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host and wait for it; from a GPU through pinned memory."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copied
