"""Schedules of the Sinkhorn temperature: from `start` to `end` while learning goes from 0 to 1."""

from __future__ import annotations

import math

from pydantic.dataclasses import dataclass

from permllm.runtime.values import SETTINGS, Positive


@dataclass(frozen=True, config=SETTINGS)
class _Range:
    """From one temperature to another.

    Attributes:
        start: the temperature at the start of learning.
        end: the temperature at its end.
    """

    start: Positive = 1.0
    end: Positive = 0.1


@dataclass(frozen=True, config=SETTINGS)
class Linear(_Range):
    """A straight line, the paper's schedule (section 5.1)."""

    def __call__(self, progress: float) -> float:
        """Return the temperature at `progress` in [0, 1]."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, config=SETTINGS)
class Cosine(_Range):
    """Half a cosine: slow at both ends."""

    def __call__(self, progress: float) -> float:
        """Return the temperature at `progress` in [0, 1]."""
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True, config=SETTINGS)
class Exponential(_Range):
    """The same factor each step: fast at first."""

    def __call__(self, progress: float) -> float:
        """Return the temperature at `progress` in [0, 1]."""
        return self.start * (self.end / self.start) ** progress


@dataclass(frozen=True, config=SETTINGS)
class Constant:
    """`start` throughout.

    Attributes:
        start: the temperature.
    """

    start: Positive = 0.3

    def __call__(self, progress: float) -> float:
        """Return the temperature at `progress` in [0, 1]."""
        return self.start
