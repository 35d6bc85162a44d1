"""Adam on the kept weights of some linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MaskedAdam:
    """Adam with a cosine schedule to zero; what the masks leave out stays zero.

    Args:
        linears: whose weights are trained. Half-precision weights are trained as float32 copies, or small steps would be
            rounded away.
        masks: bool `(C_out, C_in)` for each of them.
        learning_rate: at the start.
        steps: how many there will be.
    """

    def __init__(self, linears: Sequence[nn.Linear], masks: Sequence[Tensor], learning_rate: float, steps: int) -> None:
        self.weights: list[Tensor] = [linear.weight for linear in linears]
        self._masks = [mask.to(weight.device) for mask, weight in zip(masks, self.weights, strict=True)]
        self._wide = [
            weight.data if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()
            for weight in self.weights
        ]
        fused = self.weights[0].device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(self._wide, lr=learning_rate, fused=fused)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Gradients for these weights, and none afterwards."""
        for weight in self.weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in self.weights:
                weight.requires_grad_(False)

    def step(self) -> None:
        """One step along the gradients of the weights, which are forgotten."""
        for wide, weight, mask in zip(self._wide, self.weights, self._masks, strict=True):
            assert weight.grad is not None
            wide.grad = weight.grad.to(wide.dtype).mul_(mask)
            weight.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._scheduler.step()
        for wide, weight in zip(self._wide, self.weights, strict=True):
            if wide.data_ptr() != weight.data_ptr():
                weight.data.copy_(wide)
