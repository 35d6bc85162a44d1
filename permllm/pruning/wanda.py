"""Wanda (Sun et al. 2024, arXiv 2306.11695, equation 1)."""

from __future__ import annotations

from torch import Tensor

from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, Norm


class Wanda(Pruner):
    """`S[i, j] = |W[i, j]| * norm(x_j)`, with the norm that the statistics have: the root mean square over tokens."""

    statistics = (Norm,)

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return saliency factors of `weight (C_out, C_in)`."""
        return SaliencyFactors(power=1, column=statistics[Norm].value.unsqueeze(0))
