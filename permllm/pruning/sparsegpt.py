"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): choose masks and correct the kept weights, column by column."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern, check_divides
from permllm.errors import TrainingError
from permllm.runtime.values import SETTINGS, Positive
from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.gram import Gram
from permllm.sparsity.nm import keep_largest
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics

_COLUMNS_AT_A_TIME = 128


@dataclass(frozen=True, config=SETTINGS)
class SparseGPT(Pruner):
    """`S[i, j] = W[i, j]^2 / [H^-1]_jj` with `H = X X^T + lambda I`, and an update of the kept weights."""

    damping: Positive = 0.01
    statistics = (Gram,)
    updates_weights = True

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return factors of the order-free saliency `W^2 / [H^-1]_jj` of `weight (C_out, C_in)`."""
        inverse = _inverse_hessian(statistics, self.damping)
        return SaliencyFactors(power=2, column=(1.0 / inverse.diagonal()).unsqueeze(0))

    @override
    def update(
        self, weight: Tensor, statistics: InputStatistics, perm: Tensor, pattern: NMPattern, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prune one layer in permuted column order, correcting the weights that are still to come.

        Args:
            weight: `(C_out, C_in)`, original channel order.
            statistics: of the layer's inputs, with the Gram matrix.
            perm: int64 `(C_in,)`; columns are visited in this order and N:M holds in it.
            pattern: N:M.
            mask: bool `(C_out, C_in)`, original order, to keep these weights; None chooses the mask group by group from the
                weights as corrected so far, by `w^2 / U_jj^2` with U the upper Cholesky factor of `H^-1`.

        Returns:
            The updated weight (dtype of `weight`, zeros are +0.0) and its mask, both in original order.
        """
        check_divides(pattern, weight.shape[1], "the layer")
        w = weight[:, perm].float()
        # The inverse of the permuted Hessian is the permuted inverse.
        upper = torch.linalg.cholesky(_inverse_hessian(statistics, self.damping)[perm][:, perm], upper=True)
        keep = torch.zeros_like(w, dtype=torch.bool) if mask is None else mask[:, perm]
        step = max(pattern.m, _COLUMNS_AT_A_TIME // pattern.m * pattern.m)
        for start in range(0, w.shape[1], step):
            stop = min(start + step, w.shape[1])
            errors = torch.zeros_like(w[:, start:stop])
            for j in range(start, stop):
                if mask is None and j % pattern.m == 0:
                    group = slice(j, j + pattern.m)
                    score = (w[:, group] / upper.diagonal()[group]).square()
                    keep[:, group] = keep_largest(score, pattern.n, dim=1)
                error = torch.where(keep[:, j], 0.0, w[:, j] / upper[j, j])
                w[:, j:stop].addr_(error, upper[j, j:stop], alpha=-1.0)
                errors[:, j - start] = error
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        inverse_perm = perm.argsort()
        keep = keep[:, inverse_perm]
        updated = w[:, inverse_perm].to(weight.dtype)
        return torch.where(keep, updated, torch.zeros_like(updated)), keep


def _inverse_hessian(statistics: InputStatistics, damping: float) -> Tensor:
    """`(X^T X + lambda I)^-1`, with a mean over tokens instead of a sum; computed once for all members of a group."""

    def compute() -> Tensor:
        hessian = statistics[Gram].value / max(statistics.tokens, 1)
        mean = hessian.diagonal().mean()
        hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
        return torch.cholesky_inverse(_cholesky(hessian))

    return statistics.derived(f"inverse Hessian, damping {damping}", compute)


def _cholesky(hessian: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(hessian)
    if info.any():
        raise TrainingError("the Hessian of a linear's inputs is not positive definite: use a larger damping or more text")
    return factor
