"""Schedules of the Sinkhorn temperature.

A call returns the temperature at `progress`, from 0 (the first step) to 1 (the last step).
"""

import math

from pydantic.dataclasses import dataclass

from permllm.settings.values import SETTINGS, Positive


@dataclass(frozen=True, config=SETTINGS)
class _Range:
    """Range of temperatures, from the first step to the last."""

    start: Positive
    end: Positive


@dataclass(frozen=True, config=SETTINGS)
class Linear(_Range):
    """Straight line, the paper's schedule (section 5.1)."""

    def __call__(self, progress: float) -> float:
        """Return the temperature."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, config=SETTINGS)
class Cosine(_Range):
    """Half a cosine: slow at both ends."""

    def __call__(self, progress: float) -> float:
        """Return the temperature."""
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True, config=SETTINGS)
class Exponential(_Range):
    """Multiplication by the same factor each step: fast at first."""

    def __call__(self, progress: float) -> float:
        """Return the temperature."""
        return self.start * (self.end / self.start) ** progress


@dataclass(frozen=True, config=SETTINGS)
class Constant:
    """Constant temperature."""

    start: Positive

    def __call__(self, progress: float) -> float:
        """Return the temperature."""
        return self.start
