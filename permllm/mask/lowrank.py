"""Masks by the log saliency, a term for each channel and a product of low rank, which learn."""

import math

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.mask.score import ScoreMask
from permllm.mask.score_linear import Scores, log_saliency_t
from permllm.models.families import ChannelGroup
from permllm.runtime.precision import products_as_they_are
from permllm.settings.config import NMPattern
from permllm.settings.values import SETTINGS, Whole
from permllm.sparsity.saliency import SaliencyFactors


class LowRankScores(Scores):
    """Sum of the log saliency, a term `c` for each channel, and a product of low rank.

    The formula is

        score[j, i] = log S[i, j] + c[j] + sum_k right[j, k] left[i, k]

    with `c (C_in,)`, `left (C_out, K)` and `right (C_in, K)`; `c` and `left` start at zero.

    Args:
        factors: saliency factors of the linear, permuted like the weight.
        rank: K; 0: only the terms of the channels.
        generator: generator of the random start of `right`.
    """

    def __init__(
        self, weight: Tensor, factors: SaliencyFactors, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.factors = factors.by_channel()
        rows, channels = weight.shape
        dtype = factors.column.dtype
        device = weight.device
        self.channel = nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))
        self.left = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        start = torch.randn(channels, rank, generator=generator, dtype=torch.float32)
        self.right = nn.Parameter((start / math.sqrt(max(1, rank))).to(device, dtype))

    @override
    def chunk_scores(self, weight_t: Tensor, channels: slice) -> SaliencyFactors:
        """Return the sum for consecutive channels as a dense score."""
        scores = log_saliency_t(weight_t[channels], self.factors.permuted(channels))
        scores += self.channel.data[channels].unsqueeze(1)
        scores.addmm_(self.right.data[channels], self.left.data.t())
        return SaliencyFactors(0, scores.t())

    @override
    def parameter_gradients(self, score_gradient: Tensor) -> list[Tensor]:
        """Return the gradients of `c`, `left` and `right`."""
        with products_as_they_are(score_gradient):  # sums over all rows could overflow in float16
            return [
                score_gradient.sum(1),
                score_gradient.t() @ self.right.data,
                score_gradient @ self.left.data,
            ]


@dataclass(kw_only=True, config=SETTINGS)
class LowRankMask(ScoreMask):
    """Masks by the log saliency, a term for each channel and a product of low rank."""

    rank: Whole
    kind = LowRankScores

    @override
    def scores(
        self,
        weight: Tensor,
        factors: SaliencyFactors,
        pattern: NMPattern,
        generator: torch.Generator,
    ) -> Scores:
        """Return the scores of a linear at the start."""
        return LowRankScores(weight, factors, self.rank, generator)

    @override
    def count(self, group: ChannelGroup, pattern: NMPattern) -> int:
        """Return the number of parameters of a group's linears."""
        return sum(group.channels + self.rank * (group.channels + rows) for rows in group.rows)
