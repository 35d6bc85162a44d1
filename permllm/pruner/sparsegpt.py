"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774)."""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.errors import TrainingError
from permllm.pruner.base import Pruner
from permllm.settings.config import NMPattern
from permllm.settings.values import SETTINGS, Positive
from permllm.sparsity.nm import keep_largest
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import Gram, InputStatistics

_COLUMNS_AT_A_TIME = 128


@dataclass(frozen=True, config=SETTINGS)
class SparseGPT(Pruner):
    """Pruner by `S[i, j] = W[i, j]^2 / [H^-1]_jj`, `H = X^T X + lambda I`, that updates weights."""

    damping: Positive
    statistics = (Gram,)
    updates_weights = True

    @override
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return one term; this saliency does not depend on a permutation."""
        inverse = _inverse_hessian(statistics, self.damping)
        return SaliencyFactors(power=2, column=(1.0 / inverse.diagonal()).unsqueeze(0))

    @override
    def update(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        permutation: Tensor,
        pattern: NMPattern,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prune a linear, one permuted column after the other; later columns correct the errors.

        Args:
            weight: `(C_out, C_in)`, in original channel order.
            statistics: statistics of the linear's inputs.
            permutation: permutation of the columns, int64 `(C_in,)`.
            pattern: N:M of the permuted mask.
            mask: weights to keep, bool `(C_out, C_in)`, in original order. None: choose the mask
                group by group from the weights corrected so far, by `w^2 / U_jj^2` with U the upper
                Cholesky factor of `H^-1`. Weights of dead channels, whose inputs are all zero,
                become zero first, as in the official code.

        Returns:
            The updated weight (dtype of `weight`, zeros are +0.0) and its mask, both in original
            order.
        """
        inverse = _inverse_hessian(statistics, self.damping)
        w = weight[:, permutation].float()
        if mask is None:
            # Channels that are zero in the whole text need no weights, and groups should keep
            # others. A given mask decides itself.
            w[:, statistics[Gram].value.diagonal()[permutation] == 0] = 0.0
        # The inverse of the permuted Hessian is the permuted inverse.
        upper = _cholesky(inverse[permutation][:, permutation], upper=True)
        keep = None if mask is None else mask[:, permutation]
        original = permutation.argsort()
        keep = prune_columns(w, upper, pattern, keep)[:, original]
        return torch.where(keep, w[:, original].to(weight.dtype), 0.0), keep


def prune_columns(w: Tensor, upper: Tensor, pattern: NMPattern, keep: Tensor | None) -> Tensor:
    """Prune columns from the first to the last, and return the mask, bool `(C_out, C_in)`.

    Args:
        w: `(C_out, C_in)`, updated in place. Pruned weights end about zero, not at zero.
        upper: `(C_in, C_in)`, the upper Cholesky factor of the inverse Hessian.
        keep: the mask; None: choose it.
    """
    step = max(pattern.m, _COLUMNS_AT_A_TIME // pattern.m * pattern.m)
    mask = torch.empty_like(w, dtype=torch.bool) if keep is None else keep
    for start in range(0, w.shape[1], step):
        block = slice(start, start + step)
        after = slice(start + step, None)
        errors = _prune_block(
            w[:, block], upper[block, block], pattern, mask[:, block], choose=keep is None
        )
        w[:, after] -= errors @ upper[block, after]
    return mask


def _prune_block(
    w: Tensor, upper: Tensor, pattern: NMPattern, mask: Tensor, choose: bool
) -> Tensor:
    """Prune the columns of a block one after the other; return their errors.

    `choose`: choose the mask of each group from the weights corrected so far, and write it.
    """
    errors = torch.empty_like(w)
    for j in range(w.shape[1]):
        if choose and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            score = (w[:, group] / upper.diagonal()[group]).square()
            mask[:, group] = keep_largest(score, pattern.n, dim=1)
        error = torch.where(mask[:, j], 0.0, w[:, j] / upper[j, j])
        w[:, j:].addr_(error, upper[j, j:], alpha=-1.0)
        errors[:, j] = error
    return errors


def _inverse_hessian(statistics: InputStatistics, damping: float) -> Tensor:
    """Return `(X^T X / tokens + lambda I)^-1`, computed once for all members of a group."""

    def compute() -> Tensor:
        hessian = statistics[Gram].value / max(statistics.tokens, 1)
        mean = hessian.diagonal().mean()
        hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
        return torch.cholesky_inverse(_cholesky(hessian))

    return statistics.derived(f"inverse Hessian, damping {damping}", compute)


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    """Return the Cholesky factor; raise TrainingError if the matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    if info.any():
        raise TrainingError(
            "the Hessian of a linear's inputs is not positive definite; expected a larger damping "
            "or more text"
        )
    return factor
