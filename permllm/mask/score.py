"""A mask that is learned with a score for each weight."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from permllm.calibration.saliency import SaliencyFactors
from permllm.calibration.statistics.base import Statistics
from permllm.learning.problem import LearningProblem
from permllm.learning.scores import FreeScores, Scores
from permllm.mask.method import MaskLearning
from permllm.mask.refined import RefinedMask, Refining
from permllm.mask.settings import ScoreSettings
from permllm.models.families import ChannelGroup


class ScoreMask(ScoreSettings, MaskLearning):
    """A score for each weight, from the logarithm of the pruner's saliency; 16 bytes a weight of a window in float32."""

    kind = FreeScores

    def scores(self, weight: Tensor, factors: SaliencyFactors, generator: torch.Generator) -> Scores:
        """What the mask of a linear is chosen by."""
        return FreeScores(weight, factors, self.centered)

    def count(self, group: ChannelGroup) -> int:
        """Parameters of the linears of a group."""
        return group.channels * sum(group.rows)

    @property
    @override
    def statistics(self) -> Statistics:
        """Of what the linears read, for the masks that learning starts from."""
        return RefinedMask.statistics if self.start == "refined" else ()

    @override
    def refining(self, problem: LearningProblem) -> Refining | None:
        """What makes the masks that learning starts from; None where it is the pruner."""
        return Refining(problem, RefinedMask().sweeps) if self.start == "refined" else None
