"""Magnitude pruning: the saliency of a weight is its absolute value."""

from __future__ import annotations

from torch import Tensor

from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics


class Magnitude(Pruner):
    """`S = |W|`."""

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return saliency factors of `weight (C_out, C_in)`; the statistics are not used."""
        return SaliencyFactors(power=1, column=weight.new_ones(1, weight.shape[1]).float())
