"""A mask that is learned with few parameters: a factor a channel, and a term of low rank on the logarithm of the saliency."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from permllm.mask.learned import MaskLearning
from permllm.models.families import ChannelGroup
from permllm.runtime.values import SETTINGS, Whole
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.scores import LowRankScores, Scores


@dataclass(kw_only=True, config=SETTINGS)
class LowRankMask(MaskLearning):
    """About as many parameters as an order has, which need no memory to speak of."""

    rank: Whole = 8
    kind = LowRankScores

    def scores(self, weight: Tensor, factors: SaliencyFactors, generator: torch.Generator) -> Scores:
        """What the mask of a linear is chosen by."""
        return LowRankScores(weight, factors, self.rank, generator)

    def count(self, group: ChannelGroup) -> int:
        """Parameters of the linears of a group."""
        return sum(group.channels + self.rank * (group.channels + rows) for rows in group.rows)
