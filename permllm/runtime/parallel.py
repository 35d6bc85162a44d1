"""Several processes under torchrun: every rank runs the same job, and rank 0 alone writes files, logs and prints.

What rank 0 has found holds in all ranks (`share`, `on_main`). An error that all ranks meet alike fails the job. A rank that
fails alone ends the command (`in_step`), and torchrun ends all ranks when one of them has died.
"""

from __future__ import annotations

import io
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
from permllm.runtime.interruption import CONTINUES

Value = TypeVar("Value")

# The others wait while rank 0 waits for another run, or writes an export.
_PATIENCE = timedelta(days=1)
# Seconds within which all ranks meet the same error, and between two looks at what the others report.
_SAME_ERROR, _LOOK_EVERY = 30.0, 0.05
# Seconds, see `stop`.
_LAST_TENSORS = 0.5
# Bytes of a tensor that are sent at a time.
_PIECE = 1 << 28
# Of the jobs and of the exchanges, equal in all ranks that are in step.
_JOBS, _EXCHANGES = count(), count()


def start() -> None:
    """Join the process group of torchrun; nothing happens in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)


def stop() -> None:
    """Leave the process group, when all work is done."""
    if dist.is_initialized():
        # A thread of gloo gives the last tensors back under the interpreter's lock, which torch 2.7 holds while it waits
        # for that thread to end: so the thread gets the time before.
        time.sleep(_LAST_TENSORS)
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device() -> int:
    """Return which of the machine's GPUs is this process's own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_device(device: torch.device) -> None:
    """Make a GPU the default one of this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def portions(samples: Tensor, at_once: int | None = None) -> list[tuple[Tensor, int]]:
    """Return this rank's portions of a batch, as many as in each other rank, none of them empty.

    Args:
        samples: indices int64 `(samples,)`, at least one.
        at_once: samples of a portion at most; None puts all of a rank into one.

    Returns:
        Each portion and how many of its samples count: all, or none where the batch has no more for this rank.
    """
    largest = -(-len(samples) // world_size())
    at_once = at_once or largest
    found = [(part, len(part)) for part in samples[rank() :: world_size()].split(at_once) if len(part)]
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
        value: a tensor, of the same shape in all ranks, which stays on its device; or what can be pickled.
    """
    if world_size() == 1:
        return value
    next(_EXCHANGES)
    if isinstance(value, Tensor):
        shared = value.contiguous()
        _broadcast(shared)
        return shared  # type: ignore[return-value]
    buffer = io.BytesIO()
    if rank() == 0:
        torch.save(value, buffer)
    size = torch.tensor(buffer.tell())
    dist.broadcast(size, src=0)
    data = buffer.getbuffer() if rank() == 0 else bytearray(int(size))
    _broadcast(torch.frombuffer(data, dtype=torch.uint8))
    # It was pickled by the same command.
    return value if rank() == 0 else torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _broadcast(tensor: Tensor) -> None:
    for piece in tensor.view(-1).view(torch.uint8).split(_PIECE) if tensor.numel() else ():
        dist.broadcast(piece, src=0)


def on_main(compute: Callable[[], Value]) -> Value:
    """Compute on rank 0 alone, and return the value, or raise the error that a person can mend, in all ranks."""
    if world_size() == 1:
        return compute()
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
        SystemExit: another rank does not. The first rank that failed has said why, and torchrun ends all ranks.
    """
    try:
        yield
    except Exception as error:
        _compare(error)
        raise
    _compare(None)


def _compare(error: Exception | None) -> None:
    if world_size() == 1:
        return
    # Not by an exchange of tensors: the others may wait for one of the job.
    store, job = dist.distributed_c10d._get_default_store(), next(_JOBS)
    mine = f"{type(error).__name__} {next(_EXCHANGES)}"
    first = error is not None and store.add(f"failures of job {job}", 1) == 1
    keys = [f"job {job}, rank {number}" for number in range(world_size())]
    store.set(keys[rank()], mine)
    until = time.monotonic() + (_SAME_ERROR if error else _PATIENCE.total_seconds())
    found: list[str] = []
    while len(found) < len(keys) and {*found, mine} == {mine} and time.monotonic() < until:
        time.sleep(_LOOK_EVERY)
        found = [store.get(key).decode() for key in keys if store.check([key])]
    if found != [mine] * len(keys):
        if first and error is not None:
            if everything_wanted():
                traceback.print_exception(error)
            print(f"error: rank {rank()}: {one_line(error) or type(error).__name__}: {CONTINUES}", file=sys.stderr)
        raise SystemExit(1)
