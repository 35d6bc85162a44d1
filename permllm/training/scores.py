"""Scores of the weights: each group of M keeps the weights with the N largest scores.

The straight-through gradient of a score is the gradient of its mask entry, `dL/dM = dL/d(W M) * W`,
for kept and pruned weights alike. It says how the loss changes, to first order, if the weight is
kept. The mask depends only on differences between the scores of a group, so the mean gradient of
the group is subtracted:

    dS[c, r] = D[c, r] - (1 / M) sum_{c' in group of c} D[c', r]        D = dL/d(W M) * W

All tensors are transposed, `(C_in, C_out)`: a row is a channel.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.runtime.precision import products_as_they_are
from permllm.sparsity.saliency import SaliencyFactors, saliency_t


class Scores(nn.Module):
    """Scores without parameters: the saliency of the pruner.

    Args:
        factors: saliency factors of a linear on its device, permuted like the stored weight.

    Attributes:
        keeps_masked: forward keeps the masked weight for backward, because the scores take more
            memory than it does.
    """

    keeps_masked = False

    def __init__(self, factors: SaliencyFactors) -> None:
        super().__init__()
        # A channel is a row in memory, because channels are gathered.
        self.factors = (
            replace(factors, column=factors.column.t().contiguous().t())
            if factors.dense
            else factors
        )

    def at(self, weight_t: Tensor, channels: Tensor | slice) -> SaliencyFactors:
        """Return the scores of some channels, as saliency factors.

        Args:
            weight_t: `(C_in, C_out)`.
            channels: int64 `(k,)`, or a slice of consecutive channels.
        """
        return replace(self.factors, column=self.factors.column.t()[channels].t())

    def gradients(self, grad: Tensor, weight_t: Tensor, m: int) -> list[Tensor]:
        """Return the gradients of the parameters, in their order.

        Args:
            grad: gradient of the masked weight, `(C_in, C_out)`.
            weight_t: `(C_in, C_out)`.
            m: M, the number of channels in a group.
        """
        dtype = self.factors.column.dtype
        # A copy is multiplied in place, because on a CPU another tensor of this size takes several
        # times as long as the product.
        of_scores = grad * weight_t if grad.dtype == dtype else grad.to(dtype).mul_(weight_t)
        groups = of_scores.unflatten(0, (-1, m))
        groups -= groups.mean(1, keepdim=True)
        return self.of_parameters(of_scores)

    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        """Return the gradients of the parameters from those of the scores, `(C_in, C_out)`."""
        return []


class FreeScores(Scores):
    """Score for each weight, `(C_in, C_out)`, that starts at the logarithm of the saliency.

    Args:
        weight: weight of the linear, `(C_out, C_in)`.
        factors: as in `Scores`.
    """

    keeps_masked = True

    def __init__(self, weight: Tensor, factors: SaliencyFactors) -> None:
        super().__init__(factors)
        # Contiguous, because channels are gathered and `all_reduce` needs contiguous gradients.
        self.free = nn.Parameter(log_saliency_t(weight.t(), factors).contiguous())

    @override
    def at(self, weight_t: Tensor, channels: Tensor | slice) -> SaliencyFactors:
        """Return the scores as a dense score."""
        return SaliencyFactors(0, self.free.data[channels].t())

    @override
    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        """Return the gradients of the scores."""
        return [of_scores]


class LowRankScores(Scores):
    """Sum of the log saliency, a term `c` for each channel, and a product of low rank.

    The formula is

        score[j, i] = log S[i, j] + c[j] + sum_k right[j, k] left[i, k]

    with `c (C_in,)`, `left (C_out, K)` and `right (C_in, K)`; `c` and `left` start at zero.

    Args:
        weight, factors: as in `FreeScores`.
        rank: K; 0: only the terms of the channels.
        generator: generator of the random start of `right`.
    """

    def __init__(
        self, weight: Tensor, factors: SaliencyFactors, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(factors)
        rows, channels = weight.shape
        dtype = factors.column.dtype
        device = weight.device
        self.channel = nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))
        self.left = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        start = torch.randn(channels, rank, generator=generator, dtype=torch.float32)
        self.right = nn.Parameter((start / math.sqrt(max(1, rank))).to(device, dtype))

    @override
    def at(self, weight_t: Tensor, channels: Tensor | slice) -> SaliencyFactors:
        """Return the sum for some channels as a dense score."""
        scores = log_saliency_t(weight_t[channels], super().at(weight_t, channels))
        scores += self.channel.data[channels].unsqueeze(1)
        scores.addmm_(self.right.data[channels], self.left.data.t())
        return SaliencyFactors(0, scores.t())

    @override
    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        """Return the gradients of `c`, `left` and `right`."""
        with products_as_they_are(of_scores):  # sums over all rows could overflow in float16
            return [of_scores.sum(1), of_scores.t() @ self.right.data, of_scores @ self.left.data]


def log_saliency_t(weight_t: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the log saliency of a transposed weight, same shape; finite where a weight is zero."""
    scores = saliency_t(weight_t, factors)
    # Not in place, because the saliency may share memory with a dense score.
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log_()
