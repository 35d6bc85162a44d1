"""Scores of the weights: each group of M keeps the N largest.

The straight-through gradient of a score is that of its mask entry, kept or not: what the loss would
gain if the weight came in, or loses while it stays. It is linear in the mask, as
`straight_through=swap` is for orders. What a group keeps follows from the differences between its
scores alone, so that the mean of its gradients says nothing and is taken away.
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
    """The saliency of the pruner, as it is.

    Args:
        factors: of the saliency of a linear, in the order that its weight is stored in, on its
            device.

    Attributes:
        keeps_masked: a masked weight that forward has made may wait for backward: it is little
            beside the scores.
    """

    keeps_masked = False

    def __init__(self, factors: SaliencyFactors) -> None:
        super().__init__()
        # Like the weight: what belongs to a channel in a row, for the channels are gathered.
        self.factors = (
            replace(factors, column=factors.column.t().contiguous().t())
            if factors.dense
            else factors
        )

    def piece(
        self, weight_t: Tensor, channels: Tensor | slice
    ) -> tuple[int, Tensor, Tensor | None]:
        """Saliency factors of some channels, as the kernels take them (`permllm.training.kernels`).

        Args:
            weight_t: `(C_in, C_out)`.
            channels: which, int64 `(k,)`, or consecutive ones.
        """
        column = self.factors.column
        if isinstance(channels, slice):
            chosen = column[:, channels]
        else:
            chosen = (
                column.t().index_select(0, channels).t()
                if self.factors.dense
                else column.index_select(1, channels)
            )
        return self.factors.power, chosen, self.factors.row

    def values_t(self, weight_t: Tensor) -> Tensor:
        """All scores of a transposed weight `(C_in, C_out)`, same shape."""
        return saliency_t(weight_t, SaliencyFactors(*self.piece(weight_t, slice(None))))

    def gradients(self, grad: Tensor, weight_t: Tensor, m: int) -> list[Tensor]:
        """Gradients of the parameters, in their order, from that of the masked weight.

        Args:
            grad, weight_t: `(C_in, C_out)`.
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
        """Gradients of the parameters, in their order, from those of the scores `(C_in, C_out)`."""
        return []


class FreeScores(Scores):
    """A score for each weight, that starts at the logarithm of the pruner's saliency.

    Args:
        weight: `(C_out, C_in)`, of the linear.
        factors: as in `Scores`.
    """

    keeps_masked = True

    def __init__(self, weight: Tensor, factors: SaliencyFactors) -> None:
        super().__init__(factors)
        # A channel in a row, whatever the weight is like: channels are gathered, and processes add
        # up what is contiguous.
        self.free = nn.Parameter(log_saliency_t(weight.t(), factors).contiguous())

    @override
    def piece(
        self, weight_t: Tensor, channels: Tensor | slice
    ) -> tuple[int, Tensor, Tensor | None]:
        return 0, self.free.data[channels].t(), None

    @override
    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        return [of_scores]


class LowRankScores(Scores):
    """The logarithm of the pruner's saliency, plus a term a channel, plus a product of low rank, which start at nothing.

    Args:
        weight, factors: as in `FreeScores`.
        rank: of the product; 0 leaves the terms of the channels.
        generator: of its start.
    """

    def __init__(
        self, weight: Tensor, factors: SaliencyFactors, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(factors)
        rows, channels = weight.shape
        dtype, device = factors.column.dtype, weight.device
        self.channel = nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))
        self.left = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        right = torch.randn(channels, rank, generator=generator, dtype=torch.float32) / math.sqrt(
            max(1, rank)
        )
        self.right = nn.Parameter(right.to(device, dtype))

    @override
    def piece(
        self, weight_t: Tensor, channels: Tensor | slice
    ) -> tuple[int, Tensor, Tensor | None]:
        power, column, row = super().piece(weight_t, channels)
        scores = log_saliency_t(weight_t[channels], SaliencyFactors(power, column, row))
        scores += self.channel.data[channels].unsqueeze(1)
        scores.addmm_(self.right.data[channels], self.left.data.t())
        return 0, scores.t(), None

    @override
    def of_parameters(self, of_scores: Tensor) -> list[Tensor]:
        with products_as_they_are(of_scores):  # their sums over all rows could overflow in float16
            return [of_scores.sum(1), of_scores.t() @ self.right.data, of_scores @ self.left.data]


def log_saliency_t(weight_t: Tensor, factors: SaliencyFactors) -> Tensor:
    """Logarithm of the saliency of a transposed weight `(C_in, C_out)`, same shape; finite where a weight is zero."""
    found = saliency_t(weight_t, factors)
    return found.clamp_min(
        torch.finfo(found.dtype).tiny
    ).log_()  # a dense score may be the saliency itself, and stays
