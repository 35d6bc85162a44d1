"""RIA, relative importance and activations (Zhang et al.

2024, "Plug-and-Play", equations 3 and 4).
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from permllm.runtime.values import SETTINGS, Amount
from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, Norm


@dataclass(frozen=True, config=SETTINGS)
class RIA(Pruner):
    """`S[i, j] = (|W[i, j]| / column sum j + |W[i, j]| / row sum i) * norm(x_j)^exponent`."""

    exponent: Amount = 0.5
    statistics = (Norm,)

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return saliency factors of `weight (C_out, C_in)`: two terms, one for the column sums and one for the row sums."""
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        activation = statistics[Norm].value.pow(self.exponent)
        of_column, of_row = (_share_of(magnitude.sum(dim)) for dim in (0, 1))
        return SaliencyFactors(
            power=1,
            column=torch.stack([activation * of_column, activation]),
            row=torch.stack([torch.ones_like(of_row), of_row]),
        )


def _share_of(total: Tensor) -> Tensor:
    """What makes a number a share of a total; nothing of nothing, as all of the numbers are nothing then."""
    return torch.where(total > 0, 1.0 / total, 0.0)
