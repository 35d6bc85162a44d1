"""A permutation of each channel group that follows from the group's saliency alone."""

from __future__ import annotations

from torch import Tensor

from permllm.permutation.base import LocalPermutation
from permllm.settings.config import NMPattern


class Spread(LocalPermutation):
    """Permutation that spreads the channels with the largest saliency over the groups of M."""

    def permutation(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the channel at each position, int64 `(C_in,)` on the CPU.

        Args:
            group: name of the channel group.
            saliency: `(rows of all members, C_in)`.
            pattern: N:M of the group.
        """
        ranked = saliency.sum(0).argsort(descending=True, stable=True).cpu()
        return ranked.view(pattern.m, -1).t().flatten()
