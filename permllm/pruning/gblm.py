"""GBLM-Pruner (Das et al. 2023, "Beyond Size", arXiv 2311.04902): Wanda's saliency, and the size of each weight's gradient."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from permllm.calibration.saliency import SaliencyFactors
from permllm.calibration.statistics.base import InputStatistics, Statistics
from permllm.calibration.statistics.gradient_square import GradientSquare
from permllm.calibration.statistics.norm import Norm
from permllm.pruning.settings import GBLMSettings


class GBLM(GBLMSettings):
    """`S[i, j] = |W[i, j]| * (norm(x_j) + alpha * G[i, j])`, with `G[i, j]^2` the sum over samples of squared gradients.

    The gradients are those of each sample's loss, the mean cross-entropy of its next tokens, in the dense model. Norms are on
    the scale of the paper's released code, `sqrt(sum of squares over all tokens / samples)`, whether the statistics have
    them so (`norm_over=samples`) or smaller by the root of the length of a sample (`tokens`): then G is made smaller with
    them, so that alpha means the same, and the masks are those of the released code. G grows with the root of the number of
    samples, norms do not: the paper's alpha belongs to its 128.
    """

    statistics: ClassVar[Statistics] = (Norm, GradientSquare)
    updates_weights = False

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """A dense score of `weight (C_out, C_in)`."""
        gradient = statistics[GradientSquare]
        length = statistics.tokens / gradient.samples
        scale = self.alpha * (statistics.norm_tokens / length) ** 0.5
        size = (gradient.value * gradient.samples).sqrt_().to(weight.device)
        return SaliencyFactors.of_each_weight(statistics[Norm].value + scale * size)
