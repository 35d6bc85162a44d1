"""Device and cores of a process."""

from __future__ import annotations

import os

import torch

from permllm.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """Return the device of a name: `auto` is CUDA when there is one, else the CPU; `cuda` is each process's own GPU.

    Raises:
        ConfigError: the device is not there, or several processes would share it.
    """
    own, processes = int(os.environ.get("LOCAL_RANK", "0")), processes_here()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        if own >= torch.cuda.device_count():
            raise ConfigError(
                f"{processes} processes need as many GPUs, and this machine has {torch.cuda.device_count()}"
            )
        return torch.device("cuda", own)
    if device == "auto":
        return torch.device("cpu")
    if device.startswith("cuda:") and processes > 1:
        raise ConfigError(
            f"model.device={device} is one GPU for {processes} processes; model.device=cuda gives each its own"
        )
    try:
        resolved = torch.device(device)
        assert resolved.type in (
            "cpu",
            "cuda",
        )  # others lack values, or float64, which statistics are summed in
        torch.ones(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.device={device!r} cannot be used here; valid are auto, cpu, and cuda with a GPU"
        ) from error
    return resolved


def processes_here() -> int:
    """Return the number of torchrun's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """Return the number of logical cores that this process may use, whatever torch does with them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
