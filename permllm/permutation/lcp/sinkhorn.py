"""Sinkhorn normalisation of permutation logits, in the log domain, with a backward that needs only the potentials."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SinkhornStart = Literal["exponential", "softmax"]


def _dim(half: int) -> int:
    """Rows first, so that the columns are exact at the end."""
    return -1 if half % 2 == 0 else -2


@torch.no_grad()
def normalize(
    logits: Tensor, temperature: float, iterations: int, start: SinkhornStart = "exponential"
) -> tuple[Tensor, list[Tensor]]:
    """Soft permutation of each block: `S^L(logits / temperature)` (PermLLM, section 4.1; Adams and Zemel 2011).

    Each half iteration subtracts a log-sum-exp along rows or columns. Autograd through this formula would keep 2 L matrices of
    B x B; these vectors are all that `logit_gradient` needs.

    Args:
        logits: `(blocks, B, B)`, float32 or float64; row = source channel, column = target position.
        temperature: positive; the lower, the closer the result is to a hard permutation.
        iterations: L >= 0, each a row and then a column normalisation.
        start: what is normalised: `exponential` of `logits / temperature` (the paper's equation), or its row `softmax` (its
            released code). For L >= 1 there is no difference.

    Returns:
        `(blocks, B, B)`, positive; for L >= 1 the columns sum to one exactly, the rows ever closer as L grows. And the
        potentials, the vectors of the half iterations, in turn `(blocks, B, 1)` and `(blocks, 1, B)`.
    """
    log_p = logits / temperature
    potentials = []
    # A row softmax before the first iteration is what that one does to the rows: it tells only where there is none.
    for half in range(max(2 * iterations, int(start == "softmax"))):
        potential = log_p.logsumexp(_dim(half), keepdim=True)
        log_p -= potential
        potentials.append(potential)
    return log_p.exp_(), potentials


@torch.no_grad()
def logit_gradient(logits: Tensor, temperature: float, potentials: list[Tensor], grad_soft: Tensor) -> Tensor:
    """The gradient of the logits from that of the soft permutation, `(blocks, B, B)`; matrices are rebuilt going backwards.

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
        # y = x - logsumexp(x, dim), so dx = dy - softmax(x) sum(dy, dim), and softmax(x) is exp(y), the current state.
        grad -= soft * grad.sum(_dim(half), keepdim=True)
        if half:  # potentials after the first are at most log B, so this cannot overflow
            soft *= potentials[half].exp()
    return grad.div_(temperature)
