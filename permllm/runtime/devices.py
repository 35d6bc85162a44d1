"""Device, cores and seeds of a process."""

import os
import random
from contextlib import suppress

import numpy as np
import torch

from permllm.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """Return the device of `model.device`.

    Args:
        device: `auto` is a GPU if there is one, or else the CPU; `cuda` is the GPU of this process.

    Raises:
        ConfigError: there is no such device, or several processes would share it.
    """
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    # Processes do not share a GPU. Other devices have no float64, in which statistics are summed.
    own_gpu = name.startswith("cuda") and (name != device or processes_here() == 1)
    if name == "cpu" or own_gpu:
        with suppress(RuntimeError, AssertionError):
            return torch.ones(1, device=name).device
    raise ConfigError(
        f"model.device={device!r} cannot be used here; valid are auto, cpu, and cuda with a GPU "
        "for each process"
    )


def processes_here() -> int:
    """Return the number of processes of torchrun on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """Return the number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python's, numpy's and torch's global generators.

    Args:
        seed: seed of all generators.
        deterministic: True: use GPU kernels that give the same bits each time. False: the backward
            of attention adds in any order.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it
        # Filling takes time, and no code reads uninitialized memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
