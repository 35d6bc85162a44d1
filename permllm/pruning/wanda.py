"""Wanda (Sun et al. 2024, arXiv 2306.11695, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from permllm.calibration.saliency import SaliencyFactors
from permllm.calibration.statistics.base import InputStatistics, Statistics
from permllm.calibration.statistics.norm import Norm


@dataclass(frozen=True)
class Wanda:
    """`S[i, j] = |W[i, j]| * norm(x_j)`, with the norm that the statistics have: the root mean square over tokens."""

    statistics: ClassVar[Statistics] = (Norm,)
    updates_weights = False

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Saliency factors of `weight (C_out, C_in)`."""
        return SaliencyFactors(power=1, column=statistics[Norm].value.unsqueeze(0))
