"""Sinkhorn normalisation in the log domain, and its gradient from the potentials alone."""

import torch
from torch import Tensor


@torch.no_grad()
def normalize(logits: Tensor, temperature: float, halves: int) -> tuple[Tensor, list[Tensor]]:
    """Return the soft permutation of each block (PermLLM, section 4.1; Adams and Zemel 2011).

    With logits X and temperature tau it is `S^L(X / tau)`:

        S^0(X) = exp(X)        S^l(X) = T_c(T_r(S^(l-1)(X)))

    `T_r` divides each row by its sum, and `T_c` each column. In the log domain each of these half
    iterations subtracts a log-sum-exp, the potential. Autograd would keep 2 L matrices of B x B;
    `logit_gradient` needs only the potentials.

    Args:
        logits: `(blocks, B, B)`, float32 or float64; row = source channel, column = target
            position.
        temperature: tau > 0; the lower, the closer the result is to a hard permutation.
        halves: 2 L, the number of half iterations: rows, columns, rows and so on.

    Returns:
        The soft permutations, `(blocks, B, B)`, positive. For L >= 1 the columns sum to one, and
        the sums of the rows approach one as L grows. And the potentials of the half iterations,
        alternately `(blocks, B, 1)` and `(blocks, 1, B)`.
    """
    log_p = logits / temperature
    potentials = []
    for half in range(halves):  # rows first, so that the columns are exact at the end
        potential = log_p.logsumexp(-1 - half % 2, keepdim=True)
        log_p -= potential
        potentials.append(potential)
    return log_p.exp_(), potentials


@torch.no_grad()
def logit_gradient(
    logits: Tensor, temperature: float, potentials: list[Tensor], grad_soft: Tensor
) -> Tensor:
    """Return the gradient of the logits from the gradient of the soft permutations.

    A half iteration `Y = X - logsumexp(X)` has `dX = dY - exp(Y) sum(dY)`, with the sum along the
    same dimension. The matrices `exp(Y)` are recomputed from the last to the first.

    Args:
        logits, temperature: as in `normalize`.
        potentials: potentials that `normalize` returned.
        grad_soft: gradient of the soft permutations, `(blocks, B, B)`.

    Returns:
        `(blocks, B, B)`.
    """
    log_p = logits / temperature
    for potential in potentials:
        log_p -= potential
    soft = log_p.exp_()
    grad = grad_soft * soft
    for half in reversed(range(len(potentials))):
        grad -= soft * grad.sum(-1 - half % 2, keepdim=True)
        if half:  # potentials after the first are at most log B, so exp cannot overflow
            soft *= potentials[half].exp()
    return grad.div_(temperature)
