"""The pruner's own masks: the N most salient of every M, in the order of the channels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrunerMask:
    """Nothing learns."""

    learned = False
    local = True
