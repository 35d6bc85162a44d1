"""RIA, relative importance and activations (Zhang et al. 2024, "Plug-and-Play", equations 3 and 4)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from permllm.calibration.saliency import SaliencyFactors
from permllm.calibration.statistics.base import InputStatistics, Statistics
from permllm.calibration.statistics.norm import Norm
from permllm.pruning.settings import RIASettings


class RIA(RIASettings):
    """`S[i, j] = (|W[i, j]| / column sum j + |W[i, j]| / row sum i) * norm(x_j)^exponent`."""

    statistics: ClassVar[Statistics] = (Norm,)
    updates_weights = False

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Saliency factors of `weight (C_out, C_in)`: two terms, one for the column sums and one for the row sums."""
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        smallest = torch.finfo(torch.float32).tiny
        activation = statistics[Norm].value.pow(self.exponent)
        column_sum = magnitude.sum(0).clamp_min(smallest)
        row_sum = magnitude.sum(1).clamp_min(smallest)
        return SaliencyFactors(
            power=1,
            column=torch.stack([activation / column_sum, activation]),
            row=torch.stack([torch.ones_like(row_sum), 1.0 / row_sum]),
        )
