"""Several processes under torchrun: every rank runs the same job, and rank 0 alone writes files, logs and prints.

What rank 0 has found holds in all ranks (`share`, `on_main`). An error that all ranks meet alike
fails the job. A rank that fails alone ends the command (`in_step`), and torchrun ends all ranks
when one of them has died.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from permllm.errors import PermLLMError, everything_wanted, one_line
from permllm.runtime.terminal import CONTINUES

Value = TypeVar("Value")

# Seconds that ranks wait while rank 0 waits for another run or writes an export, and within which
# all meet the same error.
_PATIENCE, _SAME_ERROR = 86400.0, 30.0
# Numbers of the jobs and of the exchanges, equal in all ranks that are in step.
_JOBS, _EXCHANGES = count(), count()


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
    largest = -(-len(samples) // world_size())
    at_once = at_once or largest
    found = [
        (part, len(part)) for part in samples[rank() :: world_size()].split(at_once) if len(part)
    ]
    return found if len(found) == -(-largest // at_once) else [*found, (samples[:1], 0)]


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, the same bits in all of them."""
    for tensor in tensors if world_size() > 1 else ():
        next(_EXCHANGES)
        dist.all_reduce(tensor)


def reduce(tensor: Tensor, to: int) -> None:
    """Replace a tensor by its sum over the ranks in one rank; elsewhere its values are of no use afterwards."""
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
    """Compute on rank 0 alone, and return the value, or raise the error that a person can mend, in all ranks."""
    found: tuple[Value | None, PermLLMError | OSError | None] = None, None
    if rank() == 0:
        try:
            found = compute(), None
        except (PermLLMError, OSError) as error:
            found = None, error
    value, failure = share(found)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


@contextmanager
def in_step() -> Iterator[None]:
    """Leave a job as all other ranks do: finished, or with the same error after the same exchanges.

    Raises:
        SystemExit: another rank does not. The first rank that failed has said why, and torchrun
            ends all ranks.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if world_size() > 1:
        _compare(failure)
    if failure is not None:
        raise failure


def _compare(failure: Exception | None) -> None:
    """Raise SystemExit unless all ranks leave the job alike."""
    # Not by an exchange of tensors: the others may wait for one of the job.
    store, job = dist.distributed_c10d._get_default_store(), next(_JOBS)
    mine = f"{type(failure).__name__} {next(_EXCHANGES)}"
    ranks = [f"job {job}, rank {number}" for number in range(world_size())]
    first = failure is not None and store.add(f"failures of job {job}", 1) == 1
    store.set(ranks[rank()], mine)
    until = time.monotonic() + (_PATIENCE if failure is None else _SAME_ERROR)
    while not store.check(ranks) and time.monotonic() < until:
        time.sleep(0.05)
    if store.check(ranks) and all(store.get(key).decode() == mine for key in ranks):
        return
    if first and failure is not None:
        if everything_wanted():
            traceback.print_exception(failure)
        print(
            f"error: rank {rank()}: {one_line(failure) or type(failure).__name__}: {CONTINUES}",
            file=sys.stderr,
        )
    raise SystemExit(1)
