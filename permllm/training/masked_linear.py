"""The linear layer that learning differentiates through: an N:M mask whose channel order or whose scores learn.

Masks are made in the transposed layout `(C_in, C_out)`: a channel is a contiguous row, a
permutation is a gather of rows, a group of M is M consecutive rows. Neither saliency nor mask is
kept for backward. Both are recomputed, a piece at a time.

**The order learns.** The masked weight goes back to the original channel order, so that the
activations are never permuted. With `S' = S P` the permuted saliency, `M'` the mask in permuted
order and the weight that multiplies the input `W * (M' P^T)`, the gradient of the permutation has
two terms, both products of B x B blocks:

    dP = S^T dS' + dM^T M'        dM = dW * W        dS' = softmax backward of dM P

`M'` in the second term is the hard mask when the straight-through step stands before `P^T`, and the
group softmax when it stands after it (as in the paper's released code): `straight_through` is
`hard` or `soft`.

Both linearise the choice of the mask. With `straight_through=swap` the choice is made instead: the
gradient at (channel c, any position of group b) is the change of the loss, linear in the mask, if c
took the place of a random member of b. In the rows where c is among the N largest of b then, its
own mask entry `dM` comes in and that of the entry it displaces goes out:

    dP[c, b] = E_p sum_r [S[r, c] > t[r, b - p]] (dM[r, c] - dM[r, at t])        t[r, b - p] the
    N-th largest without member p

and for c's own group it is the same with c itself as the member whose place is taken. No softmax,
so its temperature is not used. The comparisons are R C B / M.

**The scores learn** in a fixed order. The weight and its scores are stored in that order, and the
inputs are permuted instead, because they are small.

All products are made in one format: that of the weights, or autocast's inside of
`permllm.runtime.precision.products_in`. Saliencies and masks come from the weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.runtime import parallel
from permllm.runtime.precision import product, product_dtype, products_as_they_are
from permllm.sparsity.nm import nm_mask
from permllm.training.blocks import BlockStack
from permllm.training.elementwise import Piece
from permllm.training.kernels import EAGER, Kernels
from permllm.training.scores import Scores
from permllm.training.settings import StraightThrough


class MaskedLinear(nn.Module):
    """Stand-in for a frozen `nn.Linear` while the channel order or the scores of its mask learn.

    Args:
        linear: the layer; its weight `(C_out, C_in)` gets no gradient. It is fastest when
            `weight.t()` is contiguous, because channels are gathered.
        scores: what the mask is chosen by; their parameters learn where they require gradients.
        pattern: N:M.
        stacks: blocks of an order that learns, which `set_order` gives before each forward; None:
            no order learns.
        straight_through: gradient of an order, see above.
        order: int64 `(C_in,)`, the fixed order that weight and scores are stored in (`weight[:,
            order]` of the dense model);
            None: the dense model's.
        kernels: of the elementwise work.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scores: Scores,
        pattern: NMPattern,
        stacks: list[BlockStack] | None = None,
        straight_through: StraightThrough = "swap",
        order: Tensor | None = None,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scores = scores
        self.pattern = pattern
        self.order = order
        self.inverse = None if order is None else order.argsort()
        self._learns_order = stacks is not None
        self._stacks = stacks or [BlockStack(0, linear.in_features // pattern.m, pattern.m)]
        self._straight_through = straight_through
        self._kernels = kernels
        self._set: tuple[Tensor, Tensor | None, list[Tensor]] | None = None

    def set_order(
        self, perm: Tensor, hard: Tensor | None = None, soft: Sequence[Tensor] = ()
    ) -> None:
        """Set the order of the next forward, which forgets it.

        Args:
            perm: int64 `(C_in,)`, the channel at each permuted position.
            hard: int64 `(C_in,)`, the same relative to its block: which row of the block's soft
                matrix sits there; may be missing where `soft` is empty.
            soft: one `(blocks, B, B)` for each stack of blocks, the differentiable soft
                permutations, of which forward needs only the way back to the logits; empty where no
                gradient of the order is wanted.
        """
        self._set = (perm, hard, list(soft))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., C_in)`, in the dense model's order, to `(..., C_out)`."""
        if not self._learns_order:
            learning = [
                values
                for values in self.scores.parameters()
                if values.requires_grad and torch.is_grad_enabled()
            ]
            return _MaskedProduct.apply(x, self, None, None, *learning)
        if self._set is None:
            raise RuntimeError("set_order must be called before forward")
        perm, hard, soft = self._set
        self._set = None  # or the soft permutations and their graph would live until the next step
        return _MaskedProduct.apply(x, self, perm, hard, *soft)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the mask of a fixed order as it is now: bool `(C_out, C_in)`, in the dense model's order."""
        found = nm_mask(self.scores.values_t(self.linear.weight.t()).t(), self.pattern)
        return found if self.inverse is None else found[:, self.inverse]

    @torch.no_grad()
    def masked_weight_t(self, weight: Tensor, perm: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `(W * mask)^T`, `(C_in, C_out)`, in the order that the weight `(C_out, C_in)` is stored in."""
        weight_t = weight.t()
        masked_t = torch.empty(weight_t.shape, dtype=dtype, device=weight.device)
        for _, _, positions in self._pieces(weight_t):
            out, piece = self._piece(masked_t, weight_t, perm, positions)
            self._kernels.mask(out, piece, self.pattern.n, self.pattern.m)
        return masked_t

    def order_gradients(
        self, weight: Tensor, perm: Tensor, hard: Tensor, grad_masked_t: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `(W * mask)^T`, `(C_in, C_out)`, and the gradient of each stack of soft permutations, `(blocks, B, B)`.

        Several processes each make the gradients of some blocks, from the sum of `grad_masked_t`
        over all processes, and zeros
        for the others: the sum over the processes is the gradient.
        """
        weight_t, n, m = weight.t(), self.pattern.n, self.pattern.m
        masked_t = torch.empty(weight_t.shape, dtype=grad_masked_t.dtype, device=weight.device)
        grad_soft = [
            torch.zeros(one.count, one.size, one.size, dtype=dtype, device=weight.device)
            for one in self._stacks
        ]
        for number, (index, blocks, positions) in enumerate(self._pieces(weight_t)):
            out, piece = self._piece(masked_t, weight_t, perm, positions)
            if not self._summed(piece, grad_masked_t, number % parallel.world_size()):
                self._kernels.mask(out, piece, n, m)
                continue
            size = self._stacks[index].size
            grad = self._block_gradients(out, piece, grad_masked_t, size)
            # The rows are in permuted order: send each back to its source channel.
            source = hard[positions].view(-1, size, 1).expand_as(grad)
            grad_soft[index][blocks].scatter_(1, source, grad.to(dtype))
        return masked_t, grad_soft

    def _summed(self, piece: Piece, grad_masked_t: Tensor, rank: int) -> bool:
        """Sum the gradient of a piece over the processes for the one that works on it; return whether it is this one."""
        if parallel.world_size() == 1:
            return True
        assert piece.channels is not None
        rows = piece.of(grad_masked_t)
        parallel.reduce(rows, rank)
        if parallel.rank() != rank:
            return False
        grad_masked_t.index_copy_(0, piece.channels, rows)
        return True

    def _block_gradients(
        self, out: Tensor, piece: Piece, grad_masked_t: Tensor, size: int
    ) -> Tensor:
        """Return the gradient `(blocks, B, B)` of the permutation of whole blocks of channels, which are masked as well."""
        n, m = self.pattern.n, self.pattern.m
        if self._straight_through == "swap":
            return self._kernels.exchanges(out, piece, grad_masked_t, n, m, size).repeat_interleave(
                m, 2
            )
        # The sums of half-precision products over all rows would overflow or vanish in float16.
        dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
        hard = self._straight_through == "hard"
        parts = self._kernels.softmax_gradients(out, piece, grad_masked_t, n, m, dtype, hard)
        s, grad_s, grad_mask, mask = (part.view(-1, size, out.shape[1]) for part in parts)
        with products_as_they_are(grad_masked_t):
            return (s @ grad_s.mT).baddbmm_(grad_mask, mask.mT)

    def _piece(
        self, out: Tensor, weight_t: Tensor, perm: Tensor | None, positions: slice
    ) -> tuple[Tensor, Piece]:
        """Return where the masked channels at some positions go, and the piece that they are."""
        if perm is None:
            return out[positions], Piece(
                weight_t[positions], None, *self.scores.piece(weight_t, positions)
            )
        return out, Piece(weight_t, perm[positions], *self.scores.piece(weight_t, perm[positions]))

    def _pieces(self, weight_t: Tensor) -> Iterator[tuple[int, slice, slice]]:
        """Split the positions into pieces of whole blocks: (index of the stack, its blocks, the positions they cover)."""
        for index, stack in enumerate(self._stacks):
            at_once = self._kernels.piece // (stack.size * weight_t.shape[1])
            step = max(1, min(at_once, -(-stack.count // parallel.world_size())))
            for first in range(0, stack.count, step):
                last = min(first + step, stack.count)
                yield (
                    index,
                    slice(first, last),
                    slice(stack.start + first * stack.size, stack.start + last * stack.size),
                )


class _MaskedProduct(torch.autograd.Function):
    """`y = x (W * mask)^T + b`, differentiable in x and, straight through, in soft permutations or in scores."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        module: MaskedLinear,
        perm: Tensor | None,
        hard: Tensor | None,
        *learning: Tensor,
    ) -> Tensor:
        dtype = product_dtype(x)
        flat = _columns_at(x.flatten(0, -2), module.order, dtype)
        weight = module.linear.weight  # the module's own may have left the device before backward
        masked_t = module.masked_weight_t(weight, perm, dtype)
        y = product(flat, masked_t)
        if module.linear.bias is not None:
            y += module.linear.bias
        kept = masked_t if module.scores.keeps_masked else None
        ctx.save_for_backward(flat if learning else None, kept, weight, perm, hard)
        ctx.module, ctx.learning_dtype = module, learning[0].dtype if learning else None
        ctx.input_shape, ctx.input_dtype, ctx.product_dtype = x.shape, x.dtype, dtype
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, masked_t, weight, perm, hard = ctx.saved_tensors
        module: MaskedLinear = ctx.module
        grad_y = grads[0].flatten(0, -2)
        grad_x: Tensor | None = None
        of_learning: list[Tensor] = []
        if x is not None and perm is not None:
            masked_t, of_learning = module.order_gradients(
                weight, perm, hard, product(x.t(), grad_y), ctx.learning_dtype
            )
        if ctx.needs_input_grad[0]:
            if masked_t is None:
                masked_t = module.masked_weight_t(weight, perm, ctx.product_dtype)
            grad_x = _columns_at(
                product(grad_y, masked_t.t()), module.inverse, ctx.input_dtype
            ).view(ctx.input_shape)
        del masked_t  # before the gradients of the scores, which may be as large
        if x is not None and perm is None:
            of_learning = module.scores.gradients(
                product(x.t(), grad_y), weight.t(), module.pattern.m
            )
        return grad_x, None, None, None, *of_learning


def _columns_at(states: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `(tokens, C)`, the columns in an order int64 `(C,)`, in a format."""
    if order is not None:
        # torch gathers columns in half precision five times slower than in float32 on a CPU.
        widened = (
            states.float() if states.device.type == "cpu" and states.dtype.itemsize < 4 else states
        )
        states = widened.index_select(1, order)
    return states.to(dtype)
