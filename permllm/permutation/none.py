"""No permutation: the channels stay in their order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.config import NMPattern


@dataclass(frozen=True)
class Identity:
    """The identity order for every channel group."""

    learned = False
    local = True
    constraint = "foldable"  # it folds into anything

    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """The order of one channel group, int64 `(C_in,)`."""
        return torch.arange(saliency.shape[1])
