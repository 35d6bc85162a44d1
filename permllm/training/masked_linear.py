"""The linear layer that LCP differentiates through: a hard N:M mask in a hard permuted order, soft gradients for the order.

Design. Masks are made in permuted channel order and in the transposed layout `(C_in, C_out)`, where a channel is a
contiguous row: a permutation is a gather of rows, a group of M is M consecutive rows, and the top N of M are comparisons
between whole rows. Neither the saliency nor the mask is kept for backward; both are recomputed, some blocks at a time. The
masked weight goes back to the original channel order, so that the activations are never permuted.

With `S' = S P` the permuted saliency, `M'` the mask in permuted order and the weight that multiplies the input
`W * (M' P^T)`, the gradient of the permutation has two terms, both products of B x B blocks:

    dP = S^T dS' + dM^T M'        dM = dW * W        dS' = softmax backward of dM P

`M'` in the second term is the hard mask when the straight-through step stands before `P^T`, and the group softmax when it
stands after it (as in the paper's released code): `straight_through` is `hard` or `soft`.

Both linearise the choice of the mask. With `straight_through=swap` the choice is made instead: the gradient at (channel c, any
position of group b) is the change of the loss, linear in the mask, if c took the place of a random member of b. In the rows
where c is among the N largest of b then, its own mask entry `dM` comes in and that of the entry it displaces goes out:

    dP[c, b] = E_p sum_r [S[r, c] > t[r, b - p]] (dM[r, c] - dM[r, at t])        t[r, b - p] the N-th largest without member p

and for c's own group it is the same with c itself as the member whose place is taken. No softmax, so its temperature is not
used. The comparisons are R C B / M, a pass over memory that a compiler fuses.

All products, those of blocks too, are made in one format: that of the weights, or autocast's inside of
`permllm.runtime.precision.products_in`. Saliencies and masks come from the weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.offload import placement_of
from permllm.runtime.precision import product, product_dtype, products_as_they_are
from permllm.training.blocks import BlockStack
from permllm.training.kernels import EAGER, Kernels
from permllm.training.problem import LearningProblem
from permllm.training.scores import Scores
from permllm.training.settings import StraightThrough

StandIn = TypeVar("StandIn", bound=nn.Module)


def _pieces(layout: _Layout, weight: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Split the positions into pieces of whole blocks: (index of the stack, its blocks, the positions they cover)."""
    for index, stack in enumerate(layout.stacks):
        step = max(1, layout.kernels.piece(weight.device.type) // (stack.size * weight.shape[0]))
        for first in range(0, stack.count, step):
            last = min(first + step, stack.count)
            yield index, slice(first, last), slice(stack.start + first * stack.size, stack.start + last * stack.size)


class _PermutedMaskedLinear(torch.autograd.Function):
    """`y = x (W * mask)^T + b`, differentiable in x and, through the soft permutations, in the channel order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: _Layout,
        perm: Tensor,
        hard: Tensor | None,
        *soft: Tensor,
    ) -> Tensor:
        dtype = product_dtype(x)
        flat = x.flatten(0, -2).to(dtype)
        y = product(flat, _masked_weight_t(weight, layout, perm, dtype))
        if bias is not None:
            y += bias
        ctx.save_for_backward(flat if soft else None, weight, perm, hard)
        ctx.layout, ctx.soft_dtype = layout, soft[0].dtype if soft else None
        ctx.input_shape, ctx.input_dtype, ctx.product_dtype = x.shape, x.dtype, dtype
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, perm, hard = ctx.saved_tensors
        layout: _Layout = ctx.layout
        weight_t = weight.t()
        grad_y = grads[0].flatten(0, -2)
        grad_soft: list[Tensor] = []
        if x is not None:
            masked_t, grad_soft = _order_gradients(layout, weight_t, perm, hard, product(x.t(), grad_y), ctx.soft_dtype)
        else:
            masked_t = _masked_weight_t(weight, layout, perm, ctx.product_dtype)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_y, masked_t.t()).view(ctx.input_shape).to(ctx.input_dtype)
        return grad_x, None, None, None, None, None, *grad_soft


def _order_gradients(
    layout: _Layout, weight_t: Tensor, perm: Tensor, hard: Tensor, grad_masked_t: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """`(W * mask)^T`, `(C_in, C_out)`, and the gradient of each stack of soft permutations, `(blocks, B, B)` in `dtype`."""
    masked_t = torch.empty(weight_t.shape, dtype=grad_masked_t.dtype, device=weight_t.device)
    grad_soft = [
        torch.empty(stack.count, stack.size, stack.size, dtype=dtype, device=weight_t.device) for stack in layout.stacks
    ]
    for index, blocks, positions in _pieces(layout, weight_t.t()):
        size = layout.stacks[index].size
        channels = perm[positions]
        masked, grad = _block_gradient(layout, weight_t, channels, grad_masked_t, size)
        masked_t.index_copy_(0, channels, masked)
        # The rows are in permuted order: send each back to its source channel.
        source = hard[positions].view(-1, size, 1).expand_as(grad)
        grad_soft[index][blocks].scatter_(1, source, grad.to(dtype))
    return masked_t, grad_soft


def _block_gradient(
    layout: _Layout, weight_t: Tensor, channels: Tensor, grad_masked_t: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Masked weight `(k, C_out)` of whole blocks of channels, and the gradient `(blocks, B, B)` of their permutation."""
    pattern, kernels, dtype = layout.pattern, layout.kernels, grad_masked_t.dtype
    piece = (weight_t, channels, *layout.scores.piece(weight_t, channels), grad_masked_t, pattern.n, pattern.m)
    if layout.straight_through == "swap":
        masked, changes = kernels.exchanges(*piece, dtype, size)
        return masked, changes.repeat_interleave(pattern.m, 2)
    # The sums of half-precision products over all rows would overflow or vanish in float16.
    block_dtype = torch.float32 if dtype == torch.float16 else dtype
    masked, s, grad_s, grad_mask, mask = kernels.gradient(*piece, block_dtype, layout.straight_through == "hard")
    shape = (-1, size, weight_t.shape[1])
    with products_as_they_are(grad_masked_t):
        grad = s.view(shape) @ grad_s.view(shape).mT
        return masked.to(dtype), grad.baddbmm_(grad_mask.view(shape), mask.view(shape).mT)


class _Layout:
    """What of a masked linear does not change from step to step."""

    def __init__(
        self,
        scores: Scores,
        pattern: NMPattern,
        stacks: list[BlockStack],
        straight_through: StraightThrough,
        kernels: Kernels,
    ) -> None:
        self.scores = scores
        self.pattern = pattern
        self.stacks = stacks
        self.straight_through: StraightThrough = straight_through
        self.kernels = kernels


def _masked_weight_t(weight: Tensor, layout: _Layout, perm: Tensor, dtype: torch.dtype) -> Tensor:
    """`(W * mask)^T`, `(C_in, C_out)`, in original channel order."""
    masked_t = torch.empty(weight.t().shape, dtype=dtype, device=weight.device)
    n, m = layout.pattern.n, layout.pattern.m
    for _, _, positions in _pieces(layout, weight):
        channels = perm[positions]
        masked = layout.kernels.mask(weight.t(), channels, *layout.scores.piece(weight.t(), channels), n, m, dtype)
        masked_t.index_copy_(0, channels, masked)
    return masked_t


class PermutedMaskedLinear(nn.Module):
    """Stands in for a frozen `nn.Linear` while its channel order is learned.

    Args:
        linear: the layer; its weight `(C_out, C_in)` is used as it is and gets no gradient. It is fastest when the weight is
            stored column by column (`weight.t()` contiguous), because channels are gathered.
        scores: what the mask is chosen by.
        pattern: N:M.
        stacks: how the positions split into blocks (see `permllm.permutation.lcp.logits`), which are worked on some at a time.
        straight_through: `swap`, or `hard` or `soft`, which mask stands in the second gradient term.
        kernels: of the elementwise work, eager or compiled.

    `set_order` must be called before each forward.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scores: Scores,
        pattern: NMPattern,
        stacks: list[BlockStack],
        straight_through: StraightThrough = "hard",
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.linear = linear
        self._layout = _Layout(scores, pattern, stacks, straight_through, kernels)
        self._order: tuple[Tensor, Tensor | None, list[Tensor]] | None = None

    def set_order(self, perm: Tensor, hard: Tensor | None = None, soft: Sequence[Tensor] = ()) -> None:
        """Set the order of the next forward, which forgets it.

        Args:
            perm: int64 `(C_in,)`, the channel at each permuted position.
            hard: int64 `(C_in,)`, the same relative to its block: which row of the block's soft matrix sits there; may be
                missing where `soft` is empty.
            soft: one `(blocks, B, B)` for each stack of blocks, the differentiable soft permutations, of which forward needs
                only the way back to the logits; empty where no gradient of the order is wanted.
        """
        self._order = (perm, hard, list(soft))

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., C_in)` to `(..., C_out)`."""
        if self._order is None:
            raise RuntimeError("set_order must be called before forward")
        perm, hard, soft = self._order
        self._order = None  # or the soft permutations and their graph would live until the next step
        return _PermutedMaskedLinear.apply(x, self.linear.weight, self.linear.bias, self._layout, perm, hard, *soft)


@contextmanager
def masked_linears(
    problem: LearningProblem,
    places: Iterable[tuple[ChannelGroup, list[BlockStack]]],
    scores_of: Callable[[str], Scores],
    straight_through: StraightThrough = "swap",
    kernels: Kernels = EAGER,
) -> Iterator[dict[str, list[PermutedMaskedLinear]]]:
    """Put a masked linear in the place of every linear of some groups, and the linears back at the end.

    The weights are stored column by column meanwhile, which makes a permutation of channels a gather of rows.

    Args:
        problem: whose model.
        places: the groups, each with how its positions split into blocks.
        scores_of: what the mask of a linear is chosen by, by its path.
        straight_through, kernels: as in `PermutedMaskedLinear`.

    Yields:
        The masked linears by the name of their group.
    """
    stacks_of = dict(places)

    def stand_in(group: ChannelGroup, path: str, linear: nn.Linear) -> PermutedMaskedLinear:
        scores = scores_of(path)
        return PermutedMaskedLinear(linear, scores, problem.pattern_of(group), stacks_of[group], straight_through, kernels)

    def by_columns(_: ChannelGroup, weight: Tensor) -> Tensor:
        return weight.t().contiguous().t()

    def by_rows(_: ChannelGroup, weight: Tensor) -> Tensor:
        return weight.contiguous()

    with standing_in(problem.model, stacks_of, stand_in, by_columns, by_rows) as masked:
        yield masked


@contextmanager
def standing_in(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    stand_in: Callable[[ChannelGroup, str, nn.Linear], StandIn],
    change: Callable[[ChannelGroup, Tensor], Tensor],
    back: Callable[[ChannelGroup, Tensor], Tensor],
) -> Iterator[dict[str, list[StandIn]]]:
    """Put something else in the place of every linear of some groups, and the linears back at the end.

    Args:
        model: of a known family.
        groups: whose linears.
        stand_in: makes what stands in for a linear at a path, whose weight is not changed yet.
        change: a weight as it is stored meanwhile.
        back: that weight as it was stored before.

    Yields:
        What stands in for them, by the name of their group.
    """
    placement = placement_of(model)
    replaced: list[tuple[ChannelGroup, str, nn.Linear]] = []
    made: dict[str, list[StandIn]] = {}
    try:
        for group in groups:
            made[group.name] = []
            with placement.layer(group.layer):
                for path in group.members:
                    linear = linear_at(model, path)
                    made[group.name].append(stand_in(group, path, linear))
                    placement.rearrange(linear, partial(change, group))
                    replaced.append((group, path, linear))
                    model.set_submodule(path, made[group.name][-1])
        yield made
    finally:
        for group, path, linear in replaced:
            placement.restore(linear, partial(back, group))
            model.set_submodule(path, linear)
