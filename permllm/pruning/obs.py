"""Optimal brain surgeon: SparseGPT's correction of the kept weights, under masks that are given."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from permllm.pruning.reconstruction import PrunedLinear, Reconstruction
from permllm.pruning.sparsegpt import SparseGPT
from permllm.runtime.values import SETTINGS, Positive


@dataclass(frozen=True, config=SETTINGS)
class OBS(Reconstruction):
    """Each pruned weight's error is made up for by the kept weights after it, column by column (arXiv 2301.00774)."""

    damping: Positive = 0.01
    statistics = SparseGPT.statistics

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the corrected weight, from the dense one."""
        assert pruned.statistics is not None
        weight, _ = SparseGPT(self.damping).update(
            pruned.dense, pruned.statistics, pruned.perm, pruned.pattern, pruned.mask
        )
        return weight
