"""Sinkhorn normalisation of permutation logits, in the log domain, with a backward that needs only the potentials."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def normalize(logits: Tensor, temperature: float, halves: int) -> tuple[Tensor, list[Tensor]]:
    """Return the soft permutation of each block: `S^L(logits / temperature)` (PermLLM, section 4.1; Adams and Zemel 2011).

    Each half iteration subtracts a log-sum-exp along rows or columns. Autograd through this formula
    would keep 2 L matrices of B x B; these vectors are all that `logit_gradient` needs.

    Args:
        logits: `(blocks, B, B)`, float32 or float64; row = source channel, column = target
            position.
        temperature: positive; the lower, the closer the result is to a hard permutation.
        halves: half iterations, in turn of rows and of columns: 2 L.

    Returns:
        `(blocks, B, B)`, positive; for L >= 1 the columns sum to one exactly, the rows ever closer
        as L grows. And the potentials, the vectors of the half iterations, in turn `(blocks, B, 1)`
        and `(blocks, 1, B)`.
    """
    log_p = logits / temperature
    potentials = []
    for half in range(halves):  # of rows first, so that the columns are exact at the end
        potential = log_p.logsumexp(-1 - half % 2, keepdim=True)
        log_p -= potential
        potentials.append(potential)
    return log_p.exp_(), potentials


@torch.no_grad()
def logit_gradient(
    logits: Tensor, temperature: float, potentials: list[Tensor], grad_soft: Tensor
) -> Tensor:
    """Return the gradient of the logits from that of the soft permutation, `(blocks, B, B)`.

    The matrices are rebuilt going backwards.

    Args:
        logits, temperature: as in `normalize`.
        potentials: what `normalize` found for them.
        grad_soft: `(blocks, B, B)`.
    """
    log_p = logits / temperature
    for potential in potentials:
        log_p -= potential
    soft = log_p.exp_()
    grad = grad_soft * soft
    for half in reversed(range(len(potentials))):
        # y = x - logsumexp(x, dim), so dx = dy - softmax(x) sum(dy, dim), and softmax(x) is exp(y),
        # the current state.
        grad -= soft * grad.sum(-1 - half % 2, keepdim=True)
        if half:  # potentials after the first are at most log B, so this cannot overflow
            soft *= potentials[half].exp()
    return grad.div_(temperature)
