"""Several processes under torchrun or srun: the first does the work of a job and keeps its record, the others help to learn.

What the first process decides about a job holds for all. The others decide nothing: in each job they do what they are told,
until they are told that it is over.

- `PREPARE`, with the settings of the job: it learns; load its model. Not said where the first process skips or fails it.
- `LEARN`, with all that is learned from. Each process says whether it can (`gathered`); then all learn, or none does.
- `OVER`, with what the job is worth to a search. Always said, so that no process can slide into another job.

Where each process holds a part of the weights, the others serve the first one while it works alone: it tells them what it
needs (`called`), and they answer (`serve_with`). While all learn together, each asks the others at the same points.

A failure in one process alone while all learn leaves the others in the middle of a step: the command then ends as a whole, and
the same command continues. One that all meet at the same step, a `TrainingError`, fails the job like any other.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from permllm.errors import TrainingError
from permllm.runtime.slurm import adopt_step
from permllm.runtime.watch import DONE, Watch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PREPARE, LEARN, OVER = "prepare", "learn", "over"
_FOUND = "found"

Server = Callable[[str, Any], None]

Value = TypeVar("Value")

# The others wait while the first process evaluates. That one has died is seen at once all the same (`Watch`).
_PATIENCE = timedelta(days=1)
# Seconds, see `stop`.
_LAST_TENSORS = 0.5
# Of a value that is sent, bytes at a time.
_PIECE = 1 << 28


class _State:
    """Of this process: its watch over the others, and whether it left them in the middle of a step."""

    watch: Watch | None = None
    out_of_step = False
    alone = False
    together = False
    phase = 0
    server: Server | None = None


def several() -> bool:
    """Whether torchrun, or srun where it is adopted, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> None:
    """Join the processes that torchrun or srun started; nothing happens without these."""
    adopt_step()
    if several() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        _State.watch = Watch(rank(), world_size(), broadcast)


def stop(how: bytes = DONE) -> None:
    """Leave the other processes, which end in turn unless all is `DONE` (see `Watch`); nothing happens without torchrun."""
    watch, _State.watch = _State.watch, None
    if watch is not None:
        watch.close(how)
        if how == DONE:
            # A thread of gloo gives the last tensors back under the interpreter's lock, which torch 2.7 holds while it waits
            # for that thread to end: so the thread gets the time before.
            time.sleep(_LAST_TENSORS)
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 keeps the records."""
    return dist.get_rank() if dist.is_initialized() and not _State.alone else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() and not _State.alone else 1


def local_device() -> int:
    """Which of the machine's GPUs is this process's own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_device(device: torch.device) -> None:
    """Make a GPU the one that this process's tensors are on where none is named."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row, with tensors on devices of this kind."""
    from torch.distributed.device_mesh import DeviceMesh  # seconds, for a single process in vain

    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, device.type)


def share(samples: Tensor, at_once: int | None = None) -> list[Tensor]:
    """The part of a batch of indices that falls to this process, `at_once` or all of them at a time.

    There are as many portions in each process; one may be empty.
    """
    largest = -(-len(samples) // world_size())
    at_once = at_once or max(1, largest)
    mine = samples[rank() :: world_size()]
    return [mine[first : first + at_once] for first in range(0, largest, at_once)]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, the same bits in all of them."""
    if world_size() > 1:
        with _in_touch():
            for tensor in tensors:
                dist.all_reduce(tensor)


def reduce(tensor: Tensor, rank: int) -> None:
    """Replace a tensor by its sum over the processes in the process of a rank; elsewhere it is of no use afterwards."""
    with _in_touch():
        dist.reduce(tensor, rank)


def broadcast(value: Value, source: int = 0) -> Value:
    """What one process has, in all of them.

    Args:
        value: plain values and tensors in dicts and lists, which arrive on the CPU; what the other processes give is not used.
        source: rank of the process.
    """
    if world_size() == 1:
        return value
    data = torch.empty(0, dtype=torch.uint8)
    if rank() == source:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    size = torch.tensor(len(data))
    with _in_touch():
        dist.broadcast(size, src=source)
        if rank() != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        for piece in data.split(_PIECE):
            dist.broadcast(piece, src=source)
    if rank() == source:
        return value
    received: Value = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    return received


def gathered(value: Value) -> list[Value]:
    """What each process has, by rank, in all of them (see `broadcast`)."""
    return [broadcast(value, source) for source in range(world_size())]


def from_first(compute: Callable[[], Value]) -> Value:
    """What the first process computes, in all of them (see `broadcast`); the others serve it meanwhile."""
    if world_size() == 1:
        return compute()
    with _phase(together=False):
        if rank() == 0:
            value = compute()
            tell(_FOUND, value)
            return value
        word, found = told()
        while word != _FOUND:
            serve(word, found)
            word, found = told()
        return cast(Value, found)


def tell(word: str, value: Any = None) -> None:
    """In the first process: say a word to the others, see above."""
    broadcast([word, value])


def told() -> tuple[str, Any]:
    """In the others: the next word, and what belongs to it."""
    word, value = cast(tuple[str, Any], broadcast(None))
    return word, value


def serve_with(server: Server | None) -> None:
    """In the others: who answers what the first process calls for while it works alone."""
    _State.server = server


def serve(word: str, value: Any) -> None:
    """In the others: answer a call of the first process."""
    assert _State.server is not None, f"nobody here answers {word}"
    _State.server(word, value)


@contextmanager
def called(word: str, value: Any) -> Iterator[None]:
    """Around what all do together, each its part: the first process, where it works alone, has the others do theirs."""
    if world_size() > 1 and rank() == 0 and not _State.together:
        tell(word, value)
    try:
        yield
    except BaseException:
        _State.out_of_step = world_size() > 1  # the others wait for what does not come
        raise


def phase() -> int:
    """Another number whenever the processes begin to work together, or one of them alone."""
    return _State.phase


@contextmanager
def _phase(together: bool) -> Iterator[None]:
    before = _State.together
    _State.together, _State.phase = together, _State.phase + 1
    try:
        yield
    finally:
        _State.together, _State.phase = before, _State.phase + 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others: they wait until they are told something."""
    _State.alone = True
    try:
        yield
    finally:
        _State.alone = False


@contextmanager
def in_step() -> Iterator[None]:
    """Around what all processes do together, step by step; notes where this process alone leaves it by an error."""
    try:
        with _phase(together=True):
            yield
    except TrainingError:
        raise
    except BaseException:
        _State.out_of_step = world_size() > 1
        raise


def out_of_step() -> bool:
    """Whether the other processes are in the middle of a step that this one has left: they can be told nothing any more."""
    return _State.out_of_step


@contextmanager
def _in_touch() -> Iterator[None]:
    """Around communication, which fails where another process is gone; the watch says so, and ends this one."""
    try:
        yield
    except RuntimeError:
        if _State.watch is not None:
            _State.watch.give_time()
        raise
