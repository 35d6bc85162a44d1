"""Sinkhorn normalisation in the log domain, with a backward that needs only the potentials."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def normalize(logits: Tensor, temperature: float, halves: int) -> tuple[Tensor, list[Tensor]]:
    """Return the soft permutation of each block (PermLLM, section 4.1; Adams and Zemel 2011).

    With logits X and temperature tau it is `S^L(X / tau)`:

        S^0(X) = exp(X)        S^l(X) = T_c(T_r(S^(l-1)(X)))

    where `T_r` divides each row by its sum and `T_c` each column. Each of these halves subtracts a
    log-sum-exp in the log domain. Autograd would keep 2 L matrices of B x B; `logit_gradient` needs
    only the vectors.

    Args:
        logits: `(blocks, B, B)`, float32 or float64; row = source channel, column = target
            position.
        temperature: tau > 0; the lower, the closer the result is to a hard permutation.
        halves: 2 L, half iterations of rows and of columns in turn.

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

    A half iteration `Y = X - logsumexp(X)` has `dX = dY - exp(Y) sum(dY)`, with the sum along its
    dimension. The matrices `exp(Y)` are rebuilt going backwards.

    Args:
        logits, temperature: as in `normalize`.
        potentials: of `normalize`.
        grad_soft: `(blocks, B, B)`.
    """
    log_p = logits / temperature
    for potential in potentials:
        log_p -= potential
    soft = log_p.exp_()
    grad = grad_soft * soft
    for half in reversed(range(len(potentials))):
        grad -= soft * grad.sum(-1 - half % 2, keepdim=True)
        if half:  # potentials after the first are at most log B, so this cannot overflow
            soft *= potentials[half].exp()
    return grad.div_(temperature)
