"""A statistic, and a pruner that uses it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.pruner.base import Pruner
from permllm.runtime import parallel
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistic, InputStatistics


class Peak(InputStatistic):
    """Largest magnitude of each channel.

    Attributes:
        value: `(C_in,)`, float32.
    """

    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None:
        self.value = torch.zeros(channels, device=device)

    def update(self, rows: Tensor) -> None:
        """Add activations, `(tokens, C_in)`, float32 or wider."""
        self.value = torch.maximum(self.value, rows.abs().amax(0).float())

    def all_reduce(self) -> None:
        """Take the maximum over the ranks, instead of the sum."""
        parallel.all_reduce([self.value], "max")


@dataclass(frozen=True)
class PeakPruner(Pruner):
    """`S[i, j] = |W[i, j]| * max(|x_j|)^exponent`.

    Attributes:
        exponent: as in `conf/pruner/peak.yaml`.
    """

    exponent: float
    statistics = (Peak,)

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return the factors of the saliency: one column vector, and ones for the rows."""
        column = statistics[Peak].value.pow(self.exponent)
        return SaliencyFactors(power=1, column=column[None])
