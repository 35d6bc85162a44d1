"""RIA, relative importance and activations (Zhang et al. 2024, "Plug-and-Play", equations 3, 4)."""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.pruner.base import Pruner
from permllm.settings.values import SETTINGS, Amount
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, Norm


@dataclass(frozen=True, config=SETTINGS)
class RIA(Pruner):
    """Pruner by `S[i, j] = (|W[i, j]| / sum of column j + |W[i, j]| / sum of row i) * a_j`.

    Here `a_j = norm(x_j)^exponent`, and the sums are of magnitudes.
    """

    exponent: Amount
    statistics = (Norm,)

    @override
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return two terms, one with the column sums and one with the row sums."""
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        activation = statistics[Norm].value.pow(self.exponent)
        # If a sum is zero, all its weights are zero.
        column_sums = magnitude.sum(0)
        row_sums = magnitude.sum(1)
        of_column = torch.where(column_sums > 0, 1.0 / column_sums, 0.0)
        of_row = torch.where(row_sums > 0, 1.0 / row_sums, 0.0)
        return SaliencyFactors(
            power=1,
            column=torch.stack([activation * of_column, activation]),
            row=torch.stack([torch.ones_like(of_row), of_row]),
        )
