"""Sinkhorn normalisation of permutation logits, in the log domain, with a backward that stores only the potentials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Sinkhorn(torch.autograd.Function):
    """Each half iteration subtracts a log-sum-exp along rows or columns; only these vectors are kept for backward.

    Autograd through the plain formula would keep 2 L matrices of B x B; here it is 2 L vectors of B, and the matrices are
    rebuilt from the scaled logits going backwards.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, iterations: int) -> Tensor:
        log_p = logits / temperature
        potentials = []
        for half in range(2 * iterations):
            dim = -1 if half % 2 == 0 else -2  # rows first, so that the columns are exact at the end
            potential = log_p.logsumexp(dim, keepdim=True)
            log_p -= potential
            potentials.append(potential)
        soft = log_p.exp_()
        ctx.save_for_backward(logits, *potentials)
        ctx.temperature = temperature
        return soft

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_soft,) = grads
        logits, *potentials = ctx.saved_tensors
        log_p = logits / ctx.temperature
        for potential in potentials:
            log_p -= potential
        soft = log_p.exp()
        grad = grad_soft * soft
        for half in reversed(range(len(potentials))):
            # y = x - logsumexp(x, dim), so dx = dy - softmax(x) sum(dy, dim), and softmax(x) is exp(y), the current state.
            dim = -1 if half % 2 == 0 else -2
            grad -= soft * grad.sum(dim, keepdim=True)
            if half:  # potentials after the first are at most log B, so this cannot overflow
                soft *= potentials[half].exp()
        return grad / ctx.temperature, None, None


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Soft permutation of each block: `S^L(logits / temperature)` (PermLLM, section 4.1; Adams and Zemel 2011).

    Args:
        logits: `(blocks, B, B)`, float32 or float64; row = source channel, column = target position.
        temperature: positive; the lower, the closer the result is to a hard permutation.
        iterations: L >= 0, each a row and then a column normalisation; 0 gives `exp(logits / temperature)`.

    Returns:
        `(blocks, B, B)`, positive. For L >= 1 the columns sum to one exactly, the rows ever closer as L grows.
    """
    return _Sinkhorn.apply(logits, temperature, iterations)
