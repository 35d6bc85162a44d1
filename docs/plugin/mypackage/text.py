"""A text to calibrate on: `calibration.dataset=mypackage.text`, or `calibration=rivers`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from permllm.data.texts import Text


class Rivers(Text):
    """Paragraphs of `rivers.txt`, a document each."""

    calibrates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents; the seed changes nothing."""
        content = (resources.files(__package__) / "rivers.txt").read_text(encoding="utf-8")
        return content.strip().split("\n\n")


TEXT = Rivers()
