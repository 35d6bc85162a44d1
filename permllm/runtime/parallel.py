"""Several processes under torchrun: every rank runs the same job, rank 0 alone writes and prints.

The value that rank 0 has found holds in all ranks (`share`, `on_main`). An error that all ranks
meet fails the job. A rank that fails alone ends (`in_step`), and torchrun then ends the others.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from permllm.errors import PermLLMError, everything_wanted, one_line
from permllm.runtime.terminal import CONTINUES

Value = TypeVar("Value")

# Seconds that ranks wait while rank 0 waits for another run or writes an export, and within which
# all meet the same error.
_PATIENCE, _SAME_ERROR = 86400.0, 30.0
# Number of the exchanges so far, equal in all ranks that are in step.
_EXCHANGES = count()


def start() -> None:
    """Join the process group of torchrun; nothing happens in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=_PATIENCE))


def stop() -> None:
    """Leave the process group, when all work is done."""
    if dist.is_initialized():
        # A thread of gloo gives the last tensors back under the interpreter's lock, which torch 2.7
        # holds while it waits for that thread to end: so the thread gets the time before.
        time.sleep(0.5)
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def portions(samples: Tensor, at_once: int | None = None) -> list[tuple[Tensor, int]]:
    """Return this rank's portions of a batch, as many as in each other rank, none of them empty.

    Args:
        samples: indices int64 `(samples,)`, at least one.
        at_once: samples of a portion at most; None puts all of a rank into one.

    Returns:
        Each portion and how many of its samples count: all, or none where the batch has no more for
        this rank.
    """
    largest = math.ceil(len(samples) / world_size())
    at_once = at_once or largest
    mine = samples[rank() :: world_size()].split(at_once)
    found = [(part, len(part)) for part in mine if len(part)]
    return found if len(found) == math.ceil(largest / at_once) else [*found, (samples[:1], 0)]


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, the same bits in all of them."""
    for tensor in tensors if world_size() > 1 else ():
        next(_EXCHANGES)
        dist.all_reduce(tensor)


def reduce(tensor: Tensor, to: int) -> None:
    """Replace a tensor by its sum over the ranks in one rank; the others must not read it then."""
    next(_EXCHANGES)
    dist.reduce(tensor, to)


def share(value: Value) -> Value:
    """Return rank 0's value in all ranks.

    Args:
        value: a tensor, of the same shape in all ranks, which stays on its device; or what can be
            pickled.
    """
    if world_size() == 1:
        return value
    next(_EXCHANGES)
    if isinstance(value, Tensor):
        tensor = value.contiguous()
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        return tensor  # type: ignore[return-value]
    found = [value]
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


def on_main(compute: Callable[[], Value]) -> Value:
    """Compute on rank 0 alone, and return the value or raise the error in all ranks."""
    found: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            found = compute()
        except (PermLLMError, OSError) as error:
            failure = error
    value, failure = share((found, failure))
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


@contextmanager
def in_step() -> Iterator[None]:
    """Raise an error that all ranks meet inside; end this process where it has failed alone.

    Raises:
        SystemExit: the other ranks do not meet the error within `_SAME_ERROR` seconds. They may
            wait for this rank for ever, but torchrun ends them when it has ended.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1 or _all_meet(error):
            raise
        if everything_wanted():
            traceback.print_exc()
        said = one_line(error) or type(error).__name__
        raise SystemExit(f"error: rank {rank()}: {said}: {CONTINUES}") from error


def _all_meet(error: Exception) -> bool:
    """Tell whether all ranks meet an error of this kind after as many exchanges."""
    # Not by an exchange of tensors: the others may wait for one of the job.
    store = dist.distributed_c10d._get_default_store()
    key = f"{type(error).__name__} {next(_EXCHANGES)}"
    met, until = store.add(key, 1), time.monotonic() + _SAME_ERROR
    while met < world_size() and time.monotonic() < until:
        time.sleep(0.05)
        met = store.add(key, 0)
    return bool(met == world_size())
