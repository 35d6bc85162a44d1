"""Sinkhorn normalisation as autograd knows it: `normalize` with `logit_gradient` for its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from permllm.permutation.lcp.sinkhorn import SinkhornStart, logit_gradient, normalize


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, soft: Tensor, *potentials: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *potentials)
        ctx.temperature = temperature
        return soft

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, *potentials = ctx.saved_tensors
        grad = logit_gradient(logits, ctx.temperature, potentials, grads[0])
        return grad, None, None, *[None] * len(potentials)


def sinkhorn(logits: Tensor, temperature: float, iterations: int, start: SinkhornStart = "exponential") -> Tensor:
    """Soft permutation of each block as in `normalize`, differentiable by the logits."""
    soft, potentials = normalize(logits, temperature, iterations, start)
    return _Sinkhorn.apply(logits, temperature, soft, *potentials)
