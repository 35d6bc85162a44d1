"""Sinkhorn normalisation as autograd differentiates it."""

from __future__ import annotations

from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, iterations: float) -> Tensor:
    """Return the soft permutations `(blocks, B, B)`; half an iteration normalises rows alone."""
    log_p = logits / temperature
    for half in range(int(2 * iterations)):
        log_p = log_p - log_p.logsumexp(1 if half % 2 else 2, keepdim=True)
    return log_p.exp()
