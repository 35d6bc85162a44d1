"""Where a process computes."""

from __future__ import annotations

import os

import torch

from permllm.errors import ConfigError
from permllm.runtime import parallel


def resolve_device(device: str) -> torch.device:
    """`auto` picks CUDA when there is one, else the CPU; `cuda` is, under torchrun, the process's own GPU.

    Raises:
        ConfigError: the device is not there, or several processes would share it.
    """
    own, processes = parallel.local_device(), parallel.local_processes()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        if own >= torch.cuda.device_count():
            raise ConfigError(f"{processes} processes need as many GPUs, and this machine has {torch.cuda.device_count()}")
        return torch.device("cuda", own)
    if device == "auto":
        return torch.device("cpu")
    if device.startswith("cuda:") and processes > 1:
        raise ConfigError(f"model.device={device} is one GPU for {processes} processes; model.device=cuda gives each its own")
    reason = None
    try:
        resolved = torch.device(device)
        if resolved.type in ("cpu", "cuda"):  # others lack values, or float64, which statistics are summed in
            torch.ones(1, device=resolved)
            return resolved
    except (RuntimeError, AssertionError) as error:
        reason = error
    raise ConfigError(f"model.device={device!r} cannot be used here; valid are auto, cpu, and cuda with a GPU") from reason


def cores() -> int:
    """Logical cores that this process may use, whatever torch does with them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
