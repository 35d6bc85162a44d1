"""No permutation: the channels stay in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.permutation.base import LocalPermutation


class Identity(LocalPermutation):
    """The identity order for every channel group."""

    constraint = "foldable"  # it folds into anything

    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the order of one channel group, int64 `(C_in,)`."""
        return torch.arange(saliency.shape[1])
