"""Processes of torchrun. Every rank runs the same job; only rank 0 writes and prints.

All ranks use the values of rank 0 (`broadcast`, `on_main`). An error in all ranks fails the job. A
rank that fails alone ends (`failing_together`), and torchrun then ends the others.
"""

import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from permllm.errors import PermLLMError, one_line, tracebacks_wanted
from permllm.runtime.signals import CONTINUES

Value = TypeVar("Value")

# Times that a rank waits for the others: in an exchange of tensors, while rank 0 alone works, which
# may be a wait for another run's lock, a download or an export, and to have an error too.
_EXCHANGE = timedelta(minutes=30)
_PATIENCE = timedelta(days=1)
_ALL_FAIL = timedelta(seconds=30)
# Group of all ranks for objects, which rank 0 may have after a long time, and group of the ranks
# that have an error, because the others may wait in an exchange.
_PATIENT: list[dist.ProcessGroup] = []
_FAILING: list[dist.ProcessGroup] = []


def start() -> None:
    """Join the process group of torchrun, or do nothing in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_EXCHANGE)
        _PATIENT.append(dist.new_group(timeout=_PATIENCE, backend="gloo"))
        _FAILING.append(dist.new_group(timeout=_ALL_FAIL, backend="gloo"))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        # A thread of gloo needs the interpreter's lock to free the last tensors. torch 2.7 holds
        # the lock while it waits for the thread, so that the thread must end before.
        time.sleep(0.5)
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def portions(samples: Tensor, at_once: int | None = None) -> list[tuple[Tensor, int]]:
    """Return the portions of a batch for this rank. All ranks have equally many, and none is empty.

    Args:
        samples: indices of the batch's windows, int64 `(windows,)`, at least one.
        at_once: largest number of windows in a portion; None: all windows of a rank.

    Each portion comes with the number of its windows that count: all, or 0 if the batch has no more
    windows for this rank.
    """
    largest = math.ceil(len(samples) / world_size())
    at_once = at_once or largest
    mine = samples[rank() :: world_size()].split(at_once)
    parts = [(part, len(part)) for part in mine if len(part)]
    if len(parts) != math.ceil(largest / at_once):
        parts.append((samples[:1], 0))
    return parts


def all_reduce(tensors: Iterable[Tensor], kind: Literal["sum", "max"] = "sum") -> None:
    """Replace each tensor by its sum or maximum over the ranks, with the same bits in all ranks."""
    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX)


def reduce(tensor: Tensor, to: int) -> None:
    """Replace a tensor in rank `to` by its sum over the ranks; the others must not read it."""
    dist.reduce(tensor, to)


def joined(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """Return the rows of all ranks on the host, in all ranks.

    Args:
        rows: rows of this rank, `(rows, ...)`. Rank 0 has the dtype of the result, because a rank
            without rows may not know it.
        indices: places of these rows in the result, int64 `(rows,)`. Each place is in one rank.
        count: number of rows in all ranks.
    """
    result = torch.zeros(count, *rows.shape[1:], dtype=broadcast(rows.dtype))
    result[indices] = rows.to(result)
    all_reduce([result.view(torch.uint8)])  # each byte is zero in all ranks but one
    return result


def all_gather(value: Value) -> list[Value]:
    """Return the values of all ranks, in all ranks; they can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """Return the value of rank 0 in all ranks. They wait long for an object.

    The value can be pickled, or is a tensor on any device with the same shape in all ranks.
    """
    if world_size() == 1:
        return value
    if isinstance(value, Tensor):
        tensor = value.contiguous()
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        return tensor  # type: ignore[return-value]
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_PATIENT[0], device=torch.device("cpu"))
    return values[0]


def on_main(compute: Callable[[], Value]) -> Value:
    """Compute only on rank 0, and return the value or raise the error in all ranks."""
    value: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            value = compute()
        except (PermLLMError, OSError) as error:
            failure = error
    value, failure = broadcast((value, failure))
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise an error inside if all ranks have one, or else end this process by SystemExit.

    The other ranks may wait for this one, and torchrun ends them when this process has ended.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1 or _all_fail():
            raise
        if tracebacks_wanted():
            traceback.print_exc()
        raise SystemExit(f"error: rank {rank()}: {one_line(error)}: {CONTINUES}") from error


def _all_fail() -> bool:
    """Tell if all ranks call this function."""
    try:
        dist.monitored_barrier(_FAILING[0], _ALL_FAIL)
    except RuntimeError:
        return False
    return True
