"""Saliency in factored form, which can be recomputed from the weight and a few vectors.

The saliency of a weight is `|w|^power` times a small sum of (column vector x row vector):

    S[i, j] = |W[i, j]|^power * sum_k row[k, i] * column[k, j]

Magnitude, Wanda and SparseGPT need one term with row = 1, RIA needs two. LCP never stores a
saliency: it permutes the column vectors with the channels and recomputes. A saliency that is no
such sum is a dense score, which has a factor for each weight and as many bytes as float32 weights:

    S[i, j] = |W[i, j]|^power * score[i, j]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SaliencyFactors:
    """Factors of one linear layer's saliency.

    Attributes:
        power: exponent of `|W|`: 1, 2, or 0 where a dense score is the saliency itself.
        column: `(K, C_in)`, float32 or float64, nonnegative; a dense score is `(C_out, C_in)`.
        row: `(K, C_out)`, like `column`; None stands for ones (and K = 1), or belongs to a dense
            score.
    """

    power: int
    column: Tensor
    row: Tensor | None = None

    @classmethod
    def of_each_weight(cls, score: Tensor, power: int = 1) -> SaliencyFactors:
        """Make the factors of `|W|^power * score`, the score `(C_out, C_in)` and nonnegative."""
        return cls(power, score)

    @property
    def dense(self) -> bool:
        """Tell whether there is a factor for each weight instead of vectors."""
        return self.row is None and len(self.column) > 1

    def permuted(self, perm: Tensor) -> SaliencyFactors:
        """Return the factors of `W[:, perm]`, for any selection of channels, int64 `(C,)`."""
        return SaliencyFactors(self.power, self.column[:, perm], self.row)

    def scaled(self, factor: float | Tensor) -> SaliencyFactors:
        """Return the factors of the saliency times a positive scalar."""
        return SaliencyFactors(self.power, self.column * factor, self.row)

    def to(self, device: torch.device | str) -> SaliencyFactors:
        """Return the same factors on `device`."""
        row = None if self.row is None else self.row.to(device)
        return SaliencyFactors(self.power, self.column.to(device), row)


def saliency(weight: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the saliency of `weight` `(C_out, C_in)`, in the dtype of the factors, same shape."""
    return saliency_t(weight.t(), factors).t()


def saliency_t(weight_t: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the saliency of a transposed weight `(C_in, C_out)`, in the dtype of the factors.

    Learning uses the transposed layout: a channel is a row there, so a permutation gathers rows.
    """
    if factors.power == 0:
        return factors.column.t()
    magnitude = weight_t.to(factors.column.dtype).abs()
    if factors.power == 2:
        magnitude = magnitude.square_()
    if factors.row is None:
        return magnitude.mul_(factors.column.t())
    # No product of matrices: inside of `products_in` that would be rounded, and the mask another
    # than the pruner's.
    score = factors.column[0].unsqueeze(1) * factors.row[0]
    for column, row in zip(factors.column[1:], factors.row[1:], strict=True):
        score.addcmul_(column.unsqueeze(1), row)
    return magnitude.mul_(score)
