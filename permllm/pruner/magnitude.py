"""Magnitude pruning."""

from torch import Tensor
from typing_extensions import override

from permllm.pruner.base import Pruner
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics


class Magnitude(Pruner):
    """Pruner by the magnitude, `S = |W|`."""

    @override
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return one term, ones."""
        return SaliencyFactors(power=1, column=weight.new_ones(1, weight.shape[1]).float())
