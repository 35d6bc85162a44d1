"""Scores of the weights: each group of M keeps the N largest.

The straight-through gradient of a score is that of its mask entry, `dL/dM = dL/d(W M) * W`, whether
the entry is kept or not: the gain of the loss if the weight comes in, or its loss while it stays.
It is linear in the mask, like `straight_through=swap` of permutations. A mask follows from the
differences between the scores of a group, so the mean of their gradients is subtracted:

    dS[c, r] = D[c, r] - (1 / M) sum_{c' in group of c} D[c', r]        D = dL/d(W M) * W

All tensors are transposed, `(C_in, C_out)`: a channel in a row.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.runtime.precision import products_as_they_are
from permllm.sparsity.saliency import SaliencyFactors, saliency_t


class Scores(nn.Module):
    """Scores that do not learn: the saliency of the pruner.

    Args:
        factors: of the saliency of a linear, on its device, in the order of its stored weight.

    Attributes:
        keeps_masked: the masked weight of forward waits for backward, because it is small beside
            the scores.
    """

    keeps_masked = False

    def __init__(self, factors: SaliencyFactors) -> None:
        super().__init__()
        # Channels are gathered, so each has a row in memory, like in the weight.
        self.factors = (
            replace(factors, column=factors.column.t().contiguous().t())
            if factors.dense
            else factors
        )

    def at(self, weight_t: Tensor, channels: Tensor | slice) -> SaliencyFactors:
        """Return the scores of some channels, as factors of a saliency.

        Args:
            weight_t: `(C_in, C_out)`.
            channels: int64 `(k,)`, or consecutive ones.
        """
        column = self.factors.column
        if isinstance(channels, slice):
            chosen = column[:, channels]
        elif self.factors.dense:
            chosen = column.t().index_select(0, channels).t()
        else:
            chosen = column.index_select(1, channels)
        return replace(self.factors, column=chosen)

    def values_t(self, weight_t: Tensor) -> Tensor:
        """Return all scores of a transposed weight `(C_in, C_out)`, same shape."""
        return saliency_t(weight_t, self.at(weight_t, slice(None)))

    def gradients(self, grad: Tensor, weight_t: Tensor, m: int) -> list[Tensor]:
        """Return the gradients of the parameters, in their order.

        Args:
            grad: of the masked weight, `(C_in, C_out)`.
            weight_t: `(C_in, C_out)`.
            m: channels of a group.
        """
        dtype = self.factors.column.dtype
        # A copy is multiplied in place: on a CPU another tensor of the size costs several times the
        # product.
        of_scores = grad * weight_t if grad.dtype == dtype else grad.to(dtype).mul_(weight_t)
        groups = of_scores.unflatten(0, (-1, m))
        groups -= groups.mean(1, keepdim=True)
        return self.of_parameters(of_scores)

    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        """Return the gradients of the parameters from those of the scores `(C_in, C_out)`."""
        return []


class FreeScores(Scores):
    """A score for each weight, `(C_in, C_out)`, that starts at the logarithm of the saliency.

    Args:
        weight: `(C_out, C_in)`, of the linear.
        factors: as in `Scores`.
    """

    keeps_masked = True

    def __init__(self, weight: Tensor, factors: SaliencyFactors) -> None:
        super().__init__(factors)
        # Contiguous: channels are gathered, and `all_reduce` needs it of the gradient.
        self.free = nn.Parameter(log_saliency_t(weight.t(), factors).contiguous())

    @override
    def at(self, weight_t: Tensor, channels: Tensor | slice) -> SaliencyFactors:
        return SaliencyFactors(0, self.free.data[channels].t())

    @override
    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        return [of_scores]


class LowRankScores(Scores):
    """Sum of the log saliency, a term `c` for each channel, and a product of low rank.

        score[j, i] = log S[i, j] + c[j] + sum_k right[j, k] left[i, k]

    with `c (C_in,)`, `left (C_out, K)` and `right (C_in, K)`; `c` and `left` start at zero.

    Args:
        weight, factors: as in `FreeScores`.
        rank: K; 0 leaves the terms of the channels.
        generator: of the start of `right`.
    """

    def __init__(
        self, weight: Tensor, factors: SaliencyFactors, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(factors)
        rows, channels = weight.shape
        dtype, device = factors.column.dtype, weight.device
        self.channel = nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))
        self.left = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        start = torch.randn(channels, rank, generator=generator, dtype=torch.float32)
        self.right = nn.Parameter((start / math.sqrt(max(1, rank))).to(device, dtype))

    @override
    def at(self, weight_t: Tensor, channels: Tensor | slice) -> SaliencyFactors:
        scores = log_saliency_t(weight_t[channels], super().at(weight_t, channels))
        scores += self.channel.data[channels].unsqueeze(1)
        scores.addmm_(self.right.data[channels], self.left.data.t())
        return SaliencyFactors(0, scores.t())

    @override
    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        with products_as_they_are(of_scores):  # their sums over all rows could overflow in float16
            return [of_scores.sum(1), of_scores.t() @ self.right.data, of_scores @ self.left.data]


def log_saliency_t(weight_t: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the log saliency of a transposed weight, same shape; finite where a weight is zero."""
    found = saliency_t(weight_t, factors)
    # Not in place: a dense score may be the saliency itself.
    return found.clamp_min(torch.finfo(found.dtype).tiny).log_()
