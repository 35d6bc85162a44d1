"""Least squares of kept weights: ADMM, then conjugate gradients, as ALPS (arXiv 2406.07831)."""

from __future__ import annotations

from functools import partial

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from permllm.errors import TrainingError
from permllm.pruning.reconstruction import PrunedLinear, Reconstruction
from permllm.runtime.values import SETTINGS, Count, Positive
from permllm.sparsity.statistics import Gram, InputStatistics

# Penalty of ADMM for a Hessian whose diagonal is 1, best for a few iterations with conjugate
# gradients after them.
_PENALTY = 0.3
# ADMM takes one product an iteration and falls fast at first; conjugate gradients take two and
# reach the end.
_ADMM_ITERATIONS = 4
# Share of the error: conjugate gradients that gain less in an iteration stop.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True, config=SETTINGS)
class ADMM(Reconstruction):
    """`min ||X (W - W')^T||^2 + lambda ||W - W'||^2` over the kept weights `W'`, all rows together.

    Channels are scaled so that the diagonal of `H = X^T X` is 1, and `(H + penalty I)^-1` serves
    ADMM and preconditions the conjugate gradients. The error never ends above that of the pruned
    weights it begins with.
    """

    iterations: Count = 12
    damping: Positive = 0.01
    statistics = (Gram,)

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the new weight. Raises TrainingError where inputs are not finite."""
        assert pruned.statistics is not None
        factors = partial(self._factors, pruned.statistics)
        root, hessian, inverse = pruned.statistics.derived(f"ADMM, damping {self.damping}", factors)
        dense, start = pruned.dense.float() * root, pruned.weight.float() * root
        mask = pruned.mask
        found = masked_least_squares(dense, start, mask, hessian, inverse, self.iterations) / root
        return torch.where(mask, found, 0.0).to(pruned.weight.dtype)

    def _factors(self, statistics: InputStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """Return the root of the damped diagonal, the Hessian scaled by it, and ADMM's inverse."""
        hessian = statistics[Gram].value / max(statistics.tokens, 1)
        diagonal = hessian.diagonal().clone()
        mean = diagonal.mean()
        root = (diagonal + (self.damping * mean if mean > 0 else 1.0)).sqrt()
        hessian.div_(root).div_(root[:, None]).fill_diagonal_(1.0)
        factor, info = torch.linalg.cholesky_ex(hessian.clone().fill_diagonal_(1.0 + _PENALTY))
        if info.any():
            raise TrainingError("reconstruction=admm: the inputs of a linear are not finite")
        return root, hessian, torch.cholesky_inverse(factor)


def masked_least_squares(
    dense: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, inverse: Tensor, iterations: int
) -> Tensor:
    """Return the `w` under the mask whose rows of `(w - dense) hessian (w - dense)^T` are small.

    Args:
        dense: float `(C_out, C_in)`.
        start: same shape, zero outside of the mask; no row ends with a larger error.
        mask: bool, same shape.
        hessian: `(C_in, C_in)`, positive definite, its diagonal 1.
        inverse: of the Hessian plus ADMM's penalty on the diagonal.
        iterations: of the conjugate gradients, at most.
    """
    mask = mask.to(dense.dtype)
    target, before = dense @ hessian, start @ hessian
    found = _admm(target, start, mask, inverse)
    after = found @ hessian
    worse = _error(start - dense, before - target) <= _error(found - dense, after - target)
    found, product = torch.where(worse, start, found), torch.where(worse, before, after)
    error = _error(found - dense, product - target).sum()
    # Preconditioned conjugate gradients, each row with step lengths of its own; none of them makes
    # its error larger.
    residual = (target - product) * mask
    conditioned = (residual @ inverse) * mask
    direction, slope = conditioned, (residual * conditioned).sum(1, keepdim=True)
    for _ in range(iterations):
        curved = (direction @ hessian) * mask
        length = _ratio(slope, (direction * curved).sum(1, keepdim=True))
        found = found + length * direction
        gain = (length * slope).sum()
        error = error - gain
        if gain <= _LEAST_GAIN * error:
            break
        residual = residual - length * curved
        conditioned = (residual @ inverse) * mask
        last, slope = slope, (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned + _ratio(slope, last) * direction
    return found


def _admm(target: Tensor, start: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Return the weights after a few iterations of ridge solution, projection and scaled dual."""
    kept, dual = start, torch.zeros_like(start)
    for _ in range(_ADMM_ITERATIONS):
        free = (target + _PENALTY * (kept - dual)) @ inverse
        kept = (free + dual) * mask
        dual = dual + free - kept
    return kept


def _error(difference: Tensor, product: Tensor) -> Tensor:
    """Return the error of each row from its difference and the Hessian's product with that."""
    return (difference * product).sum(1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the ratio, zero where a row is at its end."""
    return torch.where(below > 0, above / below, 0.0)
