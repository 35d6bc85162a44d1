"""Logits of a permutation in blocks, and the soft permutations that they give."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permllm.errors import TrainingError
from permllm.permutation.lcp.sinkhorn import logit_gradient, normalize
from permllm.sparsity.blocks import BlockStack


class BlockLogits(nn.Module):
    """Learnable logits of one permutation, relative to a fixed start (PermLLM, section 4.2).

    Args:
        base: int64 `(C_in,)`, the permutation at the start, which is cut into blocks: position p of
            block b holds channel `base[b B + p]`.
        stacks: blocks of the positions (`split_blocks`).
        logits: float32 or float64 `(blocks, B, B)` for each stack; row = channel of the block, as
            in `base`; column = target position in the block.
        scale: start of a learnable scalar a (the paper's released code). The effective logits are
            `clamp(a * logits, -1, 1)`, and their gradient ignores the clamp, so that a logit can
            leave the bound. None: no scale and no clamp.
    """

    base: Tensor
    first: Tensor

    def __init__(
        self,
        base: Tensor,
        stacks: list[BlockStack],
        logits: list[Tensor],
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("base", base.clone())  # loading a state writes into the buffer
        self.stacks = stacks
        starts = [
            stack.start + stack.size * torch.arange(stack.count).repeat_interleave(stack.size)
            for stack in stacks
        ]
        self.register_buffer("first", torch.cat(starts).to(base.device), persistent=False)
        self.logits = nn.ParameterList(nn.Parameter(stack) for stack in logits)
        start = None if scale is None else torch.tensor(scale, device=logits[0].device)
        self.scale = None if start is None else nn.Parameter(start)

    def effective(self, number: int) -> Tensor:
        """Return the effective logits of a stack."""
        logits: Tensor = self.logits[number]
        if self.scale is None:
            return logits
        scaled = logits * self.scale
        # The difference is zero and has the gradient of `scaled`.
        return scaled.detach().clamp(-1.0, 1.0) + (scaled - scaled.detach())

    def order(self, hard: Tensor) -> Tensor:
        """Return the channel at each position, int64 `(C_in,)`.

        Args:
            hard: int64 `(C_in,)`, the row of the block's matrix at each position.
        """
        return self.base[self.first + hard]


class SoftBatch:
    """Soft permutations of one block size, made together, and the backward to their logits.

    Forward uses the hard permutations and never reads the values of the soft permutations. So
    stand-ins of their shape, zeros that take no memory, collect the gradients.

    Args:
        orders: all logits, by name of the permutation.
        stacks: stacks in this batch, each by its permutation and its number in the permutation.
        temperature, halves: as in `normalize`.

    Attributes:
        stacks: as given.
        stand_ins: leaf tensors, `(blocks, B, B)` for each stack.
        soft: soft permutations of all stacks, concatenated, `(blocks, B, B)`, not differentiable;
            may be deleted.
    """

    def __init__(
        self,
        orders: Mapping[str, BlockLogits],
        stacks: list[tuple[str, int]],
        temperature: float,
        halves: int,
    ) -> None:
        self.stacks = stacks
        self._orders = orders
        self._temperature = temperature
        logits = self._logits()
        self._counts = [len(stack) for stack in logits]
        self.soft, self._potentials = normalize(_joined(logits), temperature, halves)
        nothing = self.soft.new_zeros(())
        self.stand_ins = [nothing.expand(stack.shape).requires_grad_() for stack in logits]

    def parts(self, values: Tensor) -> dict[tuple[str, int], Tensor]:
        """Return the part of each stack in values `(blocks, ...)`."""
        return dict(zip(self.stacks, values.split(self._counts), strict=True))

    def backward(self) -> None:
        """Send the gradients of the stand-ins on to the logits.

        Raises TrainingError if a stand-in has no gradient.
        """
        logits = self._logits()
        gradients = []
        for (name, _), stand_in in zip(self.stacks, self.stand_ins, strict=True):
            if stand_in.grad is None:
                raise TrainingError(f"the loss does not depend on the permutation of {name}")
            gradients.append(stand_in.grad)
        of_logits = logit_gradient(
            _joined(logits), self._temperature, self._potentials, _joined(gradients)
        )
        torch.autograd.backward(logits, of_logits.split(self._counts))

    def _logits(self) -> list[Tensor]:
        return [self._orders[name].effective(number) for name, number in self.stacks]


def soft_batches(
    orders: Mapping[str, BlockLogits], temperature: float, halves: int
) -> list[SoftBatch]:
    """Return the soft permutations of several permutations, in batches.

    On a GPU all blocks of a size are one batch, because each operator is a launch. On a CPU a batch
    is one stack, because it fits into the cache.
    """
    batches: dict[object, list[tuple[str, int]]] = {}
    for name, order in orders.items():
        for number, stack in enumerate(order.logits):
            together = stack.shape[-1] if stack.is_cuda else (name, number)
            batches.setdefault(together, []).append((name, number))
    return [SoftBatch(orders, stacks, temperature, halves) for stacks in batches.values()]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])
