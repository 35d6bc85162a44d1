"""No permutation: the channels stay in their order."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern
from permllm.permutation.base import LocalPermutation
from permllm.training.problem import LearningProblem


class Identity(LocalPermutation):
    """The identity order for every channel group."""

    constraint = "foldable"  # it folds into anything

    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the order of one channel group, int64 `(C_in,)`."""
        return torch.arange(saliency.shape[1])

    @override
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        return {group.name: torch.arange(group.channels) for group in problem.groups}
