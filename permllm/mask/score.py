"""A mask that is learned with a score for each weight."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from permllm.mask.learned import MaskLearning
from permllm.models.families import ChannelGroup
from permllm.runtime.values import SETTINGS
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.scores import FreeScores, Scores


@dataclass(kw_only=True, config=SETTINGS)
class ScoreMask(MaskLearning):
    """A score for each weight, from the logarithm of the pruner's saliency; 16 bytes a weight of a window in float32."""

    kind = FreeScores

    def scores(self, weight: Tensor, factors: SaliencyFactors, generator: torch.Generator) -> Scores:
        """What the mask of a linear is chosen by."""
        return FreeScores(weight, factors)

    def count(self, group: ChannelGroup) -> int:
        """Parameters of the linears of a group."""
        return group.channels * sum(group.rows)
