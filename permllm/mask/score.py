"""A mask that is learned with a score for each weight."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm.calibration.saliency import SaliencyFactors
from permllm.learning.scores import FreeScores, Scores
from permllm.mask.method import MaskLearning
from permllm.models.families import ChannelGroup


class ScoreMask(MaskLearning):
    """A score for each weight, from the logarithm of the pruner's saliency; 16 bytes a weight of a window in float32."""

    kind = FreeScores

    def scores(self, weight: Tensor, factors: SaliencyFactors, generator: torch.Generator) -> Scores:
        """What the mask of a linear is chosen by."""
        return FreeScores(weight, factors)

    def count(self, group: ChannelGroup) -> int:
        """Parameters of the linears of a group."""
        return group.channels * sum(group.rows)
