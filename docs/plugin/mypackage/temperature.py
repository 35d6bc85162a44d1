"""A schedule of the Sinkhorn temperature."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Temperature that halves `halvings` times, after equal parts of the training.

    Attributes:
        start: the first temperature.
        halvings: how often it halves.
    """

    start: float
    halvings: int

    def __call__(self, progress: float) -> float:
        """Return the temperature at `progress` in [0, 1]."""
        done = min(int(progress * (self.halvings + 1)), self.halvings)
        return self.start / 2**done
