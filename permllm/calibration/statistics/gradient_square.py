"""The mean square of each weight's gradient: the diagonal of the empirical Fisher information, one sample a draw."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm.calibration.statistics.base import GradientStatistic


class GradientSquare(GradientStatistic):
    """Squares of the gradients of each sample's loss, summed over samples.

    Attributes:
        samples: that were added.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.samples = 0
        self._square_sum = torch.zeros(shape, dtype=dtype)

    def update(self, gradient: Tensor) -> None:
        """Add the gradient `(C_out, C_in)` of one sample's loss."""
        self.samples += 1
        self._square_sum.addcmul_(gradient, gradient)

    @property
    def value(self) -> Tensor:
        """Mean over samples, `(C_out, C_in)` on the host, float32 or the wider dtype of the weights."""
        return self._square_sum / max(self.samples, 1)
