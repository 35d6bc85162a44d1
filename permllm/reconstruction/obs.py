"""Optimal brain surgeon: SparseGPT's update of the kept weights under given masks."""

from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.pruner.sparsegpt import SparseGPT
from permllm.reconstruction.base import PrunedLinear, Reconstruction
from permllm.settings.values import SETTINGS, Positive


@dataclass(frozen=True, config=SETTINGS)
class OBS(Reconstruction):
    """Optimal brain surgeon, SparseGPT's update of the kept weights under given masks."""

    damping: Positive
    statistics = SparseGPT.statistics

    @override
    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the dense weight after the update."""
        weight, _ = SparseGPT(self.damping).update(
            pruned.dense, pruned.statistics, pruned.permutation, pruned.pattern, pruned.mask
        )
        return weight
