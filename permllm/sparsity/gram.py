"""The Gram matrix of the inputs: the Hessian of a linear's squared output error (SparseGPT)."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm.sparsity.statistics import InputStatistic


class Gram(InputStatistic):
    """`X^T X`, C_in squared numbers.

    Attributes:
        value: float32 `(C_in, C_in)`.
    """

    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None:
        self.value = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    def update(self, rows: Tensor) -> None:
        """Add activations `(tokens, C_in)`."""
        self.value.addmm_(rows.t().float(), rows.float())

    @staticmethod
    def memory(channels: int) -> int:
        """Bytes, with the copies that inverting it needs."""
        return 5 * 4 * channels**2
