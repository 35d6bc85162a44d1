"""Saliency in factored form, which is computed from the weight and a few vectors when needed.

The saliency of a weight is `|w|^power` times a small sum of (row vector x column vector):

    S[i, j] = |W[i, j]|^power * sum_k row[k, i] * column[k, j]

Magnitude, Wanda and SparseGPT need one term with row = 1; RIA needs two terms. LCP stores no
saliency, because it can permute the column vectors and compute the saliency again. Any other
saliency needs a dense score, a factor for each weight, which takes as much memory as the weights in
float32:

    S[i, j] = |W[i, j]|^power * score[i, j]
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SaliencyFactors:
    """Factors of the saliency of one linear.

    Attributes:
        power: exponent of `|W|`: 1, 2, or 0 if a dense score is the saliency.
        column: `(K, C_in)`, float32 or float64, nonnegative; a dense score is `(C_out, C_in)`.
        row: `(K, C_out)`, same dtype, nonnegative; None: ones with K = 1, or `column` is a dense
            score.
    """

    power: int
    column: Tensor
    row: Tensor | None = None

    @property
    def dense(self) -> bool:
        """Tell whether `column` has a factor for each weight (a dense score)."""
        return self.row is None and len(self.column) > 1

    def by_channel(self) -> Self:
        """Return the same factors with each channel of a dense score in a row of memory."""
        return replace(self, column=self.column.t().contiguous().t()) if self.dense else self

    def permuted(self, permutation: Tensor | slice) -> Self:
        """Return the factors of `W[:, permutation]`, int64, which may select any channels."""
        return replace(self, column=self.column.t()[permutation].t())

    def to(self, device: torch.device | str) -> Self:
        """Return the same factors on `device`."""
        row = None if self.row is None else self.row.to(device)
        return replace(self, column=self.column.to(device), row=row)


def saliency(weight: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the saliency of a weight `(C_out, C_in)`, same shape, in the dtype of the factors."""
    return saliency_t(weight.t(), factors).t()


def saliency_t(weight_t: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the saliency of a transposed weight `(C_in, C_out)`, same shape."""
    if factors.power == 0:
        return factors.column.t()
    magnitude = weight_t.to(factors.column.dtype).abs()
    if factors.power == 2:
        magnitude = magnitude.square_()
    if factors.row is None:
        return magnitude.mul_(factors.column.t())
    # Not by a matrix product, because `products_in` would round it and so change the mask.
    score = factors.column[0].unsqueeze(1) * factors.row[0]
    for column, row in zip(factors.column[1:], factors.row[1:], strict=True):
        score.addcmul_(column.unsqueeze(1), row)
    return magnitude.mul_(score)
