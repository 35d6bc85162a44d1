"""Several processes under torchrun that learn the same logits, each from its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# While the first process evaluates the dense model, the others wait for it.
_PATIENCE = timedelta(days=1)


def start() -> None:
    """Join the processes that torchrun started; nothing happens without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)


def rank() -> int:
    """Number of this process; 0 keeps the records."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device() -> int:
    """Which of the machine's GPUs is this process's own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share(samples: Tensor) -> Tensor:
    """The part of a batch of indices that falls to this process; may be empty."""
    return samples[rank() :: world_size()]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, the same bits in all of them."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def agree(value: bool) -> bool:
    """What the first process says."""
    if world_size() == 1:
        return value
    said = torch.tensor([int(value)])
    dist.broadcast(said, src=0)
    return bool(said.item())
