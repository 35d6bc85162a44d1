"""A reconstruction of the kept weights, linear by linear."""

from __future__ import annotations

from torch import Tensor

from permllm.reconstruction.base import PrunedLinear, Reconstruction
from permllm.sparsity.statistics import Gram


class RowScale(Reconstruction):
    """Factor for each row that minimises the squared error of the linear's output.

    With `H = X^T X`, a dense row w and its pruned row v, the factor is `w H v^T / v H v^T`.
    """

    statistics = (Gram,)

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the new weight, `(C_out, C_in)`, zero outside of the mask."""
        product = pruned.weight.float() @ pruned.statistics[Gram].value
        same = (product * pruned.weight).sum(1, keepdim=True)
        factor = (product * pruned.dense).sum(1, keepdim=True) / same.clamp_min(1e-12)
        return (pruned.weight * factor).to(pruned.weight.dtype)
