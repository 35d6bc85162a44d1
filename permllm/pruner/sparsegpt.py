"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774)."""

from collections.abc import Callable

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
    """Pruner by `S[i, j] = W[i, j]^2 / [H^-1]_jj`, `H = X X^T + lambda I`, that updates weights."""

    damping: Positive = 0.01
    statistics = (Gram,)
    updates_weights = True

    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return one term; this saliency does not depend on a permutation."""
        inverse = _inverse_hessian(statistics, self.damping)
        return SaliencyFactors(power=2, column=(1.0 / inverse.diagonal()).unsqueeze(0))

    @override
    def update(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        perm: Tensor,
        pattern: NMPattern,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prune a linear, one permuted column after the other; later columns correct the errors.

        Args:
            weight: `(C_out, C_in)`, in original channel order.
            statistics: statistics of the linear's inputs, with the Gram matrix.
            perm: permutation of the columns, int64 `(C_in,)`.
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
        w = weight[:, perm].float()
        if mask is None:
            # Channels that are zero in the whole text need no weights, and groups should keep
            # others. A given mask decides itself.
            w[:, statistics[Gram].value.diagonal()[perm] == 0] = 0.0
        # The inverse of the permuted Hessian is the permuted inverse.
        upper = torch.linalg.cholesky(inverse[perm][:, perm], upper=True)
        keep = None if mask is None else mask[:, perm]
        prune = by_columns if w.device.type == "cpu" else by_groups
        original = perm.argsort()
        keep = prune_columns(w, upper, pattern, keep, prune)[:, original]
        return torch.where(keep, w[:, original].to(weight.dtype), 0.0), keep


Prune = Callable[[Tensor, Tensor, NMPattern, Tensor | None], tuple[Tensor, Tensor]]


def prune_columns(
    w: Tensor, upper: Tensor, pattern: NMPattern, keep: Tensor | None, prune: Prune
) -> Tensor:
    """Prune columns from the first to the last, and return the mask, bool `(C_out, C_in)`.

    Args:
        w: `(C_out, C_in)`, updated in place. Pruned weights end about zero, not at zero.
        upper: `(C_in, C_in)`, the upper Cholesky factor of the inverse Hessian.
        pattern: N:M.
        keep: the mask; None: choose it.
        prune: `by_columns` or `by_groups`.
    """
    step = max(pattern.m, _COLUMNS_AT_A_TIME // pattern.m * pattern.m)
    masks = []
    for start in range(0, w.shape[1], step):
        block = slice(start, start + step)
        after = slice(start + step, None)
        block_keep = None if keep is None else keep[:, block]
        errors, mask = prune(w[:, block], upper[block, block], pattern, block_keep)
        w[:, after] -= errors @ upper[block, after]
        masks.append(mask)
    return torch.cat(masks, 1)


def by_columns(
    w: Tensor, upper: Tensor, pattern: NMPattern, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Prune the columns of a block one after the other; return their errors and the mask."""
    errors = torch.empty_like(w)
    mask = torch.empty_like(w, dtype=torch.bool) if keep is None else keep
    for j in range(w.shape[1]):
        if keep is None and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            score = (w[:, group] / upper.diagonal()[group]).square()
            mask[:, group] = keep_largest(score, pattern.n, dim=1)
        error = torch.where(mask[:, j], 0.0, w[:, j] / upper[j, j])
        w[:, j:].addr_(error, upper[j, j:], alpha=-1.0)
        errors[:, j] = error
    return errors, mask


def by_groups(
    w: Tensor, upper: Tensor, pattern: NMPattern, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Prune a block as `by_columns` does, up to rounding, in a third of a GPU's launches.

    Weights are divided by the diagonal of `upper`. Then the errors `e` of a row in a group solve a
    triangular system: `e_j + sum_{i < j} e_i upper_ij = w_j` if j is pruned, and `e_j = 0` if j is
    kept.
    """
    scale = upper.diagonal()
    upper = upper / scale
    scaled = w / scale
    errors = []
    dropped = []
    for start in range(0, w.shape[1], pattern.m):
        group = slice(start, start + pattern.m)
        of_group = scaled[:, group]
        if keep is None:
            order = of_group.abs().argsort(dim=1, descending=True, stable=True)
            drop = torch.zeros_like(of_group, dtype=torch.bool)
            drop.scatter_(1, order[:, pattern.n :], True)
        else:
            drop = ~keep[:, group]
        systems = upper[group, group] * drop.unsqueeze(1)
        sides = (of_group * drop).unsqueeze(1)
        error = torch.linalg.solve_triangular(
            systems, sides, upper=True, left=False, unitriangular=True
        )[:, 0]
        scaled[:, start:].addmm_(error, upper[group, start:], alpha=-1.0)
        errors.append(error)
        dropped.append(drop)
    w.copy_(scaled.mul_(scale))
    return torch.cat(errors, 1), ~torch.cat(dropped, 1)


def _inverse_hessian(statistics: InputStatistics, damping: float) -> Tensor:
    """Return `(X^T X / tokens + lambda I)^-1`, computed once for all members of a group."""

    def compute() -> Tensor:
        hessian = statistics[Gram].value / max(statistics.tokens, 1)
        mean = hessian.diagonal().mean()
        hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
        factor, info = torch.linalg.cholesky_ex(hessian)
        if info.any():
            raise TrainingError(
                "the Hessian of a linear's inputs is not positive definite; expected a larger "
                "damping or more text"
            )
        return torch.cholesky_inverse(factor)

    return statistics.derived(f"inverse Hessian, damping {damping}", compute)
