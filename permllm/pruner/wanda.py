"""Wanda (Sun et al. 2024, arXiv 2306.11695, equation 1)."""

from torch import Tensor
from typing_extensions import override

from permllm.pruner.base import Pruner
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, Norm


class Wanda(Pruner):
    """Pruner by `S[i, j] = |W[i, j]| * norm(x_j)`; the norm is a root mean square over tokens."""

    statistics = (Norm,)

    @override
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return one term, the norms."""
        return SaliencyFactors(power=1, column=statistics[Norm].value.unsqueeze(0))
