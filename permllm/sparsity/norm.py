"""The norm of each input channel: what Wanda and RIA weigh magnitudes with."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm.sparsity.statistics import InputStatistic


class Norm(InputStatistic):
    """Sums of squares over tokens, float64."""

    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None:
        self._norm_tokens = norm_tokens
        self._tokens = 0
        self._square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._dtype = torch.float32

    def update(self, rows: Tensor) -> None:
        """Add activations `(tokens, C_in)`."""
        self._tokens += rows.shape[0]
        self._dtype = rows.dtype
        self._square_sum += rows.square().sum(0).double()

    @property
    def value(self) -> Tensor:
        """Root mean square of each channel over tokens, times `sqrt(norm_tokens)`.

        `(C_in,)`, float32 or the wider dtype of the activations.
        """
        return (self._square_sum / max(self._tokens / self._norm_tokens, 1)).sqrt().to(self._dtype)
