"""Magnitude pruning: the saliency of a weight is its absolute value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, Statistics


@dataclass(frozen=True)
class Magnitude:
    """`S = |W|`."""

    statistics: ClassVar[Statistics] = ()
    updates_weights = False

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Saliency factors of `weight (C_out, C_in)`; the statistics are not used."""
        return SaliencyFactors(power=1, column=weight.new_ones(1, weight.shape[1]).float())
