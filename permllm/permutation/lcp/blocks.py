"""The logits that live on the blocks of an order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from permllm.learning.stacks import BlockStack
from permllm.permutation.lcp.settings import SinkhornStart
from permllm.permutation.lcp.sinkhorn import gradient_path, normalize
from permllm.runtime.memory import to_device


class _Clamped(torch.autograd.Function):
    """Clamp to +-1 with a straight-through gradient: a logit that has reached the bound must find its way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class BlockLogits(nn.Module):
    """The learnable logits of one order, on top of a fixed base order.

    Args:
        base: int64 `(C_in,)`, the order that the blocks are cut from: position p of block b holds channel `base[b B + p]`.
        stacks: how the positions split into blocks (`split_blocks`).
        logits: one float32 `(blocks, B, B)` for each stack; row = channel of the block in base order, column = target position
            in the block.
        scale: when given, a learnable scalar: the logits in use are `clamp(scale * logits, -1, 1)`, whose gradient passes as
            if nothing were clamped (the paper's released code); otherwise they are used as they are.
    """

    base: Tensor
    first: Tensor

    def __init__(self, base: Tensor, stacks: list[BlockStack], logits: list[Tensor], scale: float | None = None) -> None:
        super().__init__()
        self.register_buffer("base", base.clone())  # its own: loading a state writes into it
        self.stacks = stacks
        starts = [stack.start + stack.size * torch.arange(stack.count).repeat_interleave(stack.size) for stack in self.stacks]
        self.register_buffer("first", torch.cat(starts).to(base.device), persistent=False)
        self.logits = nn.ParameterList(nn.Parameter(stack) for stack in logits)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale, device=logits[0].device))
        self._noise: list[Tensor] = []

    @torch.no_grad()
    def normalized(
        self, temperature: float, iterations: int, start: SinkhornStart = "exponential"
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Soft permutations, not differentiable, and their potentials, a stack each (see `sinkhorn.py`)."""
        pairs = [normalize(stack, temperature, iterations, start) for stack in self._effective()]
        return [soft for soft, _ in pairs], [potentials for _, potentials in pairs]

    def gradient_paths(self, temperature: float, potentials: list[list[Tensor]]) -> list[Tensor]:
        """What carries gradients of the soft permutations back to the logits, one a stack, without their values."""
        return [gradient_path(stack, temperature, found) for stack, found in zip(self._effective(), potentials, strict=True)]

    def perturb(self, width: float, generator: torch.Generator | None) -> None:
        """Add Gumbel noise times `width` to the logits in use, until the next call; 0 takes it away."""
        self._noise = []
        if width:
            for stack in self.logits:
                uniform = torch.rand(stack.shape, generator=generator).clamp_(1e-7, 1 - 1e-7)
                gumbel = uniform.log_().neg_().log_().mul_(-width).to(stack.dtype)
                self._noise.append(to_device(gumbel, stack.device))

    def _effective(self) -> list[Tensor]:
        logits = list(self.logits)
        if self.scale is not None:
            logits = [_Clamped.apply(stack * self.scale) for stack in logits]
        return [stack + noise for stack, noise in zip(logits, self._noise, strict=True)] if self._noise else logits

    def order(self, hard: Tensor) -> Tensor:
        """The channel at each position, int64 `(C_in,)`, when `hard` `(C_in,)` is the row of its block's matrix there."""
        return self.base[self.first + hard]
