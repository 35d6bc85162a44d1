"""The checkpoint of a window that learns."""

from __future__ import annotations

import logging
import time
from typing import Any

from permllm.errors import DataError
from permllm.runs.tensors import load_state, save_state
from permllm.runtime import parallel
from permllm.training.problem import LearningProblem

log = logging.getLogger(__name__)

# Seconds between checkpoints within an epoch, and how many times as long as writing one takes
# learning goes on.
_EVERY, _TIMES_WRITING = 120.0, 50.0


class Checkpoint:
    """The file of one training, which rank 0 writes.

    Args:
        problem: whose directory the file is in; without one nothing is written.
        file: its name.
    """

    def __init__(self, problem: LearningProblem, file: str) -> None:
        self.path = problem.directory / file if problem.directory and not parallel.rank() else None
        self._next = time.perf_counter() + _EVERY

    @property
    def due(self) -> bool:
        """Tell whether the latest one is old."""
        return time.perf_counter() > self._next

    def save(self, state: dict[str, Any]) -> None:
        """Write a state in the place of the one before."""
        if self.path is None:
            return
        started = time.perf_counter()
        save_state(self.path, state)
        now = time.perf_counter()
        self._next = now + max(_EVERY, _TIMES_WRITING * (now - started))


def read_checkpoint(problem: LearningProblem, file: str) -> dict[str, Any] | None:
    """Read the checkpoint that an interrupted run left; None: there is none, or it is unreadable and learning begins anew."""

    def read() -> dict[str, Any] | None:
        path = problem.directory / file if problem.directory else None
        if path is None or not path.is_file():
            return None
        try:
            return load_state(path, problem.device)
        except DataError as error:
            log.warning("%s: learning begins anew", error)
            path.unlink()
            return None

    return parallel.on_main(read)
