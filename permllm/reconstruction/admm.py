"""Least squares for kept weights by ADMM and conjugate gradients, as ALPS (arXiv 2406.07831)."""

from functools import partial

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.reconstruction.base import PrunedLinear, Reconstruction
from permllm.settings.values import SETTINGS, Count, Positive
from permllm.sparsity.statistics import Gram, InputStatistics

# Penalty of ADMM for a Hessian with diagonal 1; the best for a few iterations before conjugate
# gradients.
_PENALTY = 0.3
# An iteration of ADMM takes one matrix product and lowers the error fast at first. One of conjugate
# gradients takes two products and converges.
_ADMM_ITERATIONS = 4
# Conjugate gradients stop if an iteration lowers the error by less than this share.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class ADMM(Reconstruction):
    """Minimum of `||X (W - W')^T||^2 + lambda ||W - W'||^2` over the kept weights `W'`.

    Channels are scaled so that the diagonal of `H = X^T X` is 1. Both ADMM and the preconditioner
    of the conjugate gradients use `(H + penalty I)^-1`. No row ends with a larger error than the
    pruned weights have at the start.
    """

    iterations: Count
    damping: Positive
    statistics = (Gram,)

    @override
    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the new weight."""
        factors = partial(self._factors, pruned.statistics)
        root, hessian, inverse = pruned.statistics.derived(f"ADMM, damping {self.damping}", factors)
        dense = pruned.dense.float() * root
        start = pruned.weight.float() * root
        scaled = masked_least_squares(dense, start, pruned.mask, hessian, inverse, self.iterations)
        return torch.where(pruned.mask, scaled / root, 0.0).to(pruned.weight.dtype)

    def _factors(self, statistics: InputStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """Return the root of the damped diagonal, the scaled Hessian, and ADMM's inverse."""
        hessian = statistics[Gram].value / max(statistics.tokens, 1)
        diagonal = hessian.diagonal().clone()
        mean = diagonal.mean()
        root = (diagonal + (self.damping * mean if mean > 0 else 1.0)).sqrt()
        hessian.div_(root).div_(root[:, None]).fill_diagonal_(1.0)
        # Inputs that are not finite give weights that are not, which pruning refuses.
        factor, _ = torch.linalg.cholesky_ex(hessian.clone().fill_diagonal_(1.0 + _PENALTY))
        return root, hessian, torch.cholesky_inverse(factor)


def masked_least_squares(
    dense: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, inverse: Tensor, iterations: int
) -> Tensor:
    """Return a `w` under the mask with a small error `(w - dense) hessian (w - dense)^T` a row.

    Args:
        dense: float `(C_out, C_in)`.
        start: same shape, zero outside of the mask; no row ends with a larger error than it has.
        mask: bool, same shape.
        hessian: `(C_in, C_in)`, positive definite, with diagonal 1.
        inverse: inverse of the Hessian plus ADMM's penalty on the diagonal.
        iterations: largest number of conjugate gradient iterations.
    """
    mask = mask.to(dense.dtype)
    target = dense @ hessian
    before = start @ hessian
    w = _admm(target, start, mask, inverse)
    after = w @ hessian
    worse = _error(start - dense, before - target) <= _error(w - dense, after - target)
    w = torch.where(worse, start, w)
    product = torch.where(worse, before, after)
    error = _error(w - dense, product - target).sum()
    # Preconditioned conjugate gradients. Each row has its own step lengths, so that no step raises
    # the error of a row.
    residual = (target - product) * mask
    conditioned = (residual @ inverse) * mask
    direction = conditioned
    slope = (residual * conditioned).sum(1, keepdim=True)
    for _ in range(iterations):
        curved = (direction @ hessian) * mask
        length = _ratio(slope, (direction * curved).sum(1, keepdim=True))
        w = w + length * direction
        gain = (length * slope).sum()
        error = error - gain
        if gain <= _LEAST_GAIN * error:
            break
        residual = residual - length * curved
        conditioned = (residual @ inverse) * mask
        last = slope
        slope = (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned + _ratio(slope, last) * direction
    return w


def _admm(target: Tensor, start: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Return the weights after a few iterations of ridge solution, projection and scaled dual."""
    w = start
    dual = torch.zeros_like(start)
    for _ in range(_ADMM_ITERATIONS):
        free = (target + _PENALTY * (w - dual)) @ inverse
        w = (free + dual) * mask
        dual = dual + free - w
    return w


def _error(difference: Tensor, product: Tensor) -> Tensor:
    """Return the error of each row; `product` is `difference` times the Hessian."""
    return (difference * product).sum(1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
