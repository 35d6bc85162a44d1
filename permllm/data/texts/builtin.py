"""The short text that comes with the package: for trying the pipeline, not for results."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from permllm.data.texts.base import Text


class Builtin(Text):
    """One document, to calibrate and to measure perplexity on."""

    calibrates = evaluates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """The document."""
        return [self.evaluation()]

    def evaluation(self) -> str:
        """The document."""
        return (resources.files(__package__) / "builtin.txt").read_text(encoding="utf-8")


TEXT = Builtin()
