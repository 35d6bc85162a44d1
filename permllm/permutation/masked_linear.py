"""The linear layer that LCP differentiates through: a hard N:M mask in a hard permuted order, soft gradients for the order.

Design. Everything happens in permuted channel order and in the transposed layout `(C_in, C_out)`, where a channel is a
contiguous row: a permutation is a gather of rows, a group of M is M consecutive rows, and the top N of M are comparisons
between whole rows. Neither the saliency nor the mask is kept for backward; both are recomputed, a few blocks at a time.

With `S' = S P` the permuted saliency, `M'` the mask in permuted order and the weight that multiplies the input
`W * (M' P^T)`, the gradient of the permutation has two terms, both products of B x B blocks:

    dP = S^T dS' + dM^T M'        dM = dW * W        dS' = softmax backward of dM P

`M'` in the second term is the hard mask when the straight-through step stands before `P^T`, and the group softmax when it
stands after it (as in the paper's released code).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permllm.permutation.blocks import BlockStack
from permllm.pruning.saliency import SaliencyFactors, saliency_t
from permllm.sparsity import NMPattern, keep_largest

StraightThrough = Literal["hard", "soft"]

# Weights handled at a time. On a CPU the float32 temporaries of a piece stay in a core's second-level cache; on a GPU a piece
# is large enough to hide the launch of its kernels, and small against the layer's memory.
_CPU_PIECE, _GPU_PIECE = 1 << 17, 1 << 25


def _pieces(stacks: list[BlockStack], weight: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Split the channels into pieces of whole blocks: (index of the stack, its blocks, the channels they cover)."""
    rows = weight.shape[0]
    elements = _CPU_PIECE if weight.device.type == "cpu" else _GPU_PIECE
    for index, stack in enumerate(stacks):
        step = max(1, elements // (stack.size * rows))
        for first in range(0, stack.count, step):
            last = min(first + step, stack.count)
            channels = slice(stack.start + first * stack.size, stack.start + last * stack.size)
            yield index, slice(first, last), channels


class _PermutedMaskedLinear(torch.autograd.Function):
    """`y = x (W * mask)^T + b`, differentiable in x and, through the soft permutations, in the channel order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: _Layout, perm: Tensor, hard: Tensor, *soft: Tensor
    ) -> Tensor:
        flat = x.flatten(0, -2)
        masked = _masked_permuted_weight(weight, layout, perm)
        y = flat.index_select(1, perm) @ masked
        if bias is not None:
            y += bias
        ctx.save_for_backward(flat, weight, perm, hard)
        ctx.layout = layout
        ctx.input_shape = x.shape
        ctx.soft_dtype = soft[0].dtype
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, perm, hard = ctx.saved_tensors
        layout: _Layout = ctx.layout
        weight_t = weight.t()
        grad_y = grads[0].flatten(0, -2)
        x = x.index_select(1, perm)
        factors = layout.factors.permuted(perm)
        m, n = layout.pattern.m, layout.pattern.n
        rows = weight.shape[0]
        needs_x = ctx.needs_input_grad[0]
        masked = torch.empty(weight_t.shape, dtype=weight.dtype, device=weight.device) if needs_x else None
        grad_soft = [
            torch.empty(stack.count, stack.size, stack.size, dtype=ctx.soft_dtype, device=weight.device)
            for stack in layout.stacks
        ]
        for index, blocks, channels in _pieces(layout.stacks, weight):
            size = layout.stacks[index].size
            w = weight_t.index_select(0, perm[channels])
            s = saliency_t(w, SaliencyFactors(factors.power, factors.column[:, channels], factors.row))
            groups = s.view(-1, m, rows)
            keep = keep_largest(groups, n, dim=1).view_as(s)
            if masked is not None:
                torch.mul(w, keep, out=masked[channels])
            grad_mask = (x[:, channels].t() @ grad_y).to(s.dtype).mul_(w)
            soft_mask = groups.softmax(1)
            grad_s = grad_mask.view_as(groups) * soft_mask
            grad_s -= soft_mask * grad_s.sum(1, keepdim=True)
            mask = keep.to(s.dtype) if layout.straight_through == "hard" else soft_mask.view_as(s)
            shape = (-1, size, rows)
            grad = s.view(shape) @ grad_s.view(shape).mT
            grad.baddbmm_(grad_mask.view(shape), mask.view(shape).mT)
            # The rows are in permuted order: send each back to its source channel.
            source = hard[channels].view(-1, size, 1).expand_as(grad)
            grad_soft[index][blocks] = torch.empty_like(grad).scatter_(1, source, grad)
        grad_x = None
        if masked is not None:
            grad_x = (grad_y @ masked.t()).index_select(1, perm.argsort()).view(ctx.input_shape)
        return grad_x, None, None, None, None, None, *grad_soft


class _Layout:
    """What of a masked linear does not change from step to step."""

    def __init__(
        self, factors: SaliencyFactors, pattern: NMPattern, stacks: list[BlockStack], straight_through: StraightThrough
    ) -> None:
        self.factors = factors
        self.pattern = pattern
        self.stacks = stacks
        self.straight_through: StraightThrough = straight_through


def _masked_permuted_weight(weight: Tensor, layout: _Layout, perm: Tensor) -> Tensor:
    """`(W * mask)[:, perm]^T`, `(C_in, C_out)`, in the dtype of the weight."""
    weight_t = weight.t()
    rows = weight.shape[0]
    factors = layout.factors.permuted(perm)
    masked = torch.empty(weight_t.shape, dtype=weight.dtype, device=weight.device)
    for _, _, channels in _pieces(layout.stacks, weight):
        w = weight_t.index_select(0, perm[channels])
        s = saliency_t(w, SaliencyFactors(factors.power, factors.column[:, channels], factors.row))
        keep = keep_largest(s.view(-1, layout.pattern.m, rows), layout.pattern.n, dim=1).view_as(s)
        torch.mul(w, keep, out=masked[channels])
    return masked


class PermutedMaskedLinear(nn.Module):
    """Stands in for a frozen `nn.Linear` while its channel order is learned.

    Args:
        linear: the layer; its weight `(C_out, C_in)` is used as it is and gets no gradient. It is fastest when the weight is
            stored column by column (`weight.t()` contiguous), because channels are gathered.
        factors: saliency factors of the layer in original channel order.
        pattern: N:M.
        stacks: how the channels split into blocks (see `permllm.permutation.blocks`).
        straight_through: `hard` or `soft`, which mask stands in the second gradient term.

    `set_order` must be called before each forward.
    """

    def __init__(
        self,
        linear: nn.Linear,
        factors: SaliencyFactors,
        pattern: NMPattern,
        stacks: list[BlockStack],
        straight_through: StraightThrough = "hard",
    ) -> None:
        super().__init__()
        self.linear = linear
        self._layout = _Layout(factors.to(linear.weight.device), pattern, stacks, straight_through)
        self._order: tuple[Tensor, Tensor, list[Tensor]] | None = None

    def set_order(self, perm: Tensor, hard: Tensor, soft: list[Tensor]) -> None:
        """Set the order of the next forward.

        Args:
            perm: int64 `(C_in,)`, the channel at each permuted position.
            hard: int64 `(C_in,)`, the same relative to its block: which row of the block's soft matrix sits there.
            soft: one `(blocks, B, B)` for each stack of blocks, the differentiable soft permutations.
        """
        self._order = (perm, hard, soft)

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., C_in)` to `(..., C_out)`."""
        if self._order is None:
            raise RuntimeError("set_order must be called before forward")
        perm, hard, soft = self._order
        return _PermutedMaskedLinear.apply(x, self.linear.weight, self.linear.bias, self._layout, perm, hard, *soft)
