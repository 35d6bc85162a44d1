"""Schedules of the Sinkhorn temperature: from `start` to `end` while learning goes from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

from permllm.errors import check_number


@dataclass(frozen=True)
class _Range:
    """From one temperature to another.

    Attributes:
        start: the temperature at the start of learning.
        end: the temperature at its end.
    """

    start: float = 1.0
    end: float = 0.1

    def __post_init__(self) -> None:
        check_number("temperature.start", self.start, positive=True)
        check_number("temperature.end", self.end, positive=True)


@dataclass(frozen=True)
class Linear(_Range):
    """A straight line, the paper's schedule (section 5.1)."""

    def __call__(self, progress: float) -> float:
        """Temperature at `progress` in [0, 1]."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine(_Range):
    """Half a cosine: slow at both ends."""

    def __call__(self, progress: float) -> float:
        """Temperature at `progress` in [0, 1]."""
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Exponential(_Range):
    """The same factor each step: fast at first."""

    def __call__(self, progress: float) -> float:
        """Temperature at `progress` in [0, 1]."""
        return self.start * (self.end / self.start) ** progress


@dataclass(frozen=True)
class Constant:
    """`start` throughout.

    Attributes:
        start: the temperature.
    """

    start: float = 0.3

    def __post_init__(self) -> None:
        check_number("temperature.start", self.start, positive=True)

    def __call__(self, progress: float) -> float:
        """Temperature at `progress` in [0, 1]."""
        return self.start
