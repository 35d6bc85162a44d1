"""What the stages of a job leave on the way: seconds and peaks of memory, the epochs of learning, the orders that it found."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.runs.job_log import noted
from permllm.runtime.memory import peak_host_memory, peak_memory, return_freed_memory


class Progress:
    """What a job leaves, in memory; `permllm.runs.directory.RunRecord` keeps it in a run directory.

    Attributes:
        metrics: as in `metrics.json`.
        history: a line for each epoch of learning.
        directory: where a checkpoint of learning may be written; None for nowhere.
    """

    directory: Path | None = None

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {"seconds": {}}
        self.history: list[dict[str, Any]] = []
        self._stages: list[str] = []
        self._since = 0.0

    def save(self) -> None:
        """Keep the metrics as they are now."""

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a stage, note the peak of the memory, and save the metrics, also when the stage is interrupted.

        A stage inside of another one takes its seconds out of that one's, and leaves the saving to it.
        """
        if not self._stages:
            return_freed_memory()  # or this stage's peak would have what the last one took
        self._lap()
        self._stages.append(name)
        try:
            yield
        finally:
            self._lap()
            self._stages.pop()
            for key, peak in (("peak_memory_bytes", peak_memory(device)), ("peak_host_memory_bytes", peak_host_memory())):
                self.metrics[key] = max(peak, self.metrics.get(key, 0))
            if not self._stages:
                noted.info("%s: %.1f s", name, self.metrics["seconds"][name])
                self.save()

    def _lap(self) -> None:
        """Count the seconds since the last lap for the innermost stage that runs."""
        now = time.perf_counter()
        if self._stages:
            seconds = self.metrics["seconds"]
            seconds[self._stages[-1]] = seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now

    def append_history(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        self.history.append(dict(values))

    def restart_history(self, passes: list[dict[str, Any]]) -> int:
        """Have the history hold these lines and no others, at the start of learning or of what is left of it.

        Returns:
            How many of them it held: those that follow were lost when the run was killed.
        """
        held = sum(1 for line, other in zip(passes, self.history, strict=False) if line == other)
        self.history = list(passes)
        return held

    def passes(self) -> list[dict[str, Any]]:
        """The lines of the history."""
        return list(self.history)

    def begin_learning(self) -> None:
        """Forget the passes of an earlier attempt, where nothing is left that learning could go on from."""
        self.restart_history([])

    def kept_orders(self, channels: Mapping[str, int]) -> dict[str, Tensor] | None:
        """The orders that an earlier process has found; None where there are none.

        Args:
            channels: of each channel group, by its name.
        """
        return None

    def keep_orders(self, orders: Mapping[str, Tensor]) -> None:
        """Keep the orders that were found, for a process that goes on.

        Args:
            orders: int64 `(C_in,)` by channel group.
        """

    def kept_masks(self, shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, Tensor] | None:
        """The masks that an earlier process has learned; None where there are none.

        Args:
            shapes: `(C_out, C_in)` of each linear, by its path.
        """
        return None

    def keep_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Keep the masks that were learned, for a process that goes on.

        Args:
            masks: bool `(C_out, C_in)` by linear, original channel order, on the CPU.
        """
