"""RIA, relative importance and activations (Zhang et al. 2024, "Plug-and-Play", equations 3, 4)."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.runtime.values import SETTINGS, Amount
from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, Norm


@dataclass(frozen=True, config=SETTINGS)
class RIA(Pruner):
    """`S[i, j] = (|W[i, j]| / column sum j + |W[i, j]| / row sum i) * norm(x_j)^exponent`."""

    exponent: Amount = 0.5
    statistics = (Norm,)

    @override
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return a term for the column sums and one for the row sums."""
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        activation = statistics[Norm].value.pow(self.exponent)
        # A sum of zero belongs to weights that are all zero.
        sums = magnitude.sum(0), magnitude.sum(1)
        of_column, of_row = (torch.where(total > 0, 1.0 / total, 0.0) for total in sums)
        return SaliencyFactors(
            power=1,
            column=torch.stack([activation * of_column, activation]),
            row=torch.stack([torch.ones_like(of_row), of_row]),
        )
