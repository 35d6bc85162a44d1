"""The pruner's own masks: the N most salient of every M, in the order of the channels."""

from __future__ import annotations

from permllm.mask.base import Mask


class PrunerMask(Mask):
    """The pruner's masks; nothing learns."""
