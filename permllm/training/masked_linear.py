"""Linear layer with an N:M mask whose permutation or whose scores learn.

Masks are made in the transposed layout `(C_in, C_out)`: a channel is a contiguous row, a
permutation gathers rows, and a group of M is M consecutive rows. Forward keeps neither saliency nor
mask for backward, which recomputes both, a piece at a time.

**The permutation learns** (PermLLM, section 4). Let `W (C_out, C_in)` be the weight, `S` its
saliency of the same shape, `P (C_in, C_in)` the permutation and `S' = S P`. The layer computes

    y = x (W * M)^T + b        M = M' P^T        M' = N largest of each group of M columns of S'

The masked weight is in the original channel order, so activations are never permuted. Let
`dM = dL/d(W * M) * W`. The gradient of P has two terms, both products of B x B blocks:

    dP = S^T dS' + dM^T M'        dS' = backward of the softmax of each group of S', from dM P

`straight_through` decides what `M'` is in the second term. With `hard`, the straight-through step
stands before `P^T`, and `M'` is the hard mask. With `soft` (the paper's released code), the step
stands after `P^T`, and `M'` is the softmax of each group.

Both linearise the choice of the mask. `straight_through=swap` makes the choice instead. Its
gradient at (channel c, any position of group b) is the change of the loss, linear in the mask, if c
replaces a random member p of b. In the rows r where c would be among the N largest of b, the mask
entry of c is added and the displaced entry is removed:

    dP[c, b] = E_p sum_r [S[r, c] > t[r, b - p]] (dM[r, c] - dM[r, at t])

Here `t[r, b - p]` is the N-th largest entry of b without p. For the own group of c, p is c. There
is no softmax. The sum takes C_out C_in B / M comparisons.

**The scores learn** under a fixed permutation. The weight and its scores are stored permuted, and
the inputs are permuted instead, because they are small.

All products have one dtype: that of the weights, or autocast's inside of
`permllm.runtime.precision.products_in`. Saliencies and masks use the weights in their own dtype.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from permllm.runtime import parallel
from permllm.runtime.precision import product, product_dtype, products_as_they_are
from permllm.settings.config import NMPattern
from permllm.sparsity.blocks import BlockStack
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import saliency
from permllm.training.elementwise import Piece
from permllm.training.kernels import EAGER, Kernels
from permllm.training.scores import Scores
from permllm.training.settings import StraightThrough


class MaskedLinear(nn.Module):
    """Stand-in for a frozen `nn.Linear` while the permutation or the scores of its mask learn.

    Args:
        linear: the layer; its weight `(C_out, C_in)` gets no gradient. A contiguous `weight.t()` is
            fastest, because channels are gathered.
        scores: scores that choose the mask; their parameters learn.
        pattern: N:M.
        stacks: blocks of the permutation that learns; `set_order` sets the permutation before each
            forward. None: the scores learn.
        straight_through: gradient of the permutation, see above.
        order: int64 `(C_in,)`, the fixed permutation of the stored weight and scores
            (`weight[:, order]` of the dense model); None: the identity.
        kernels: kernels of the elementwise work.
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
        """Set the permutation for the next forward alone.

        Args:
            perm: int64 `(C_in,)`, the channel at each permuted position.
            hard: int64 `(C_in,)`, the same channels as rows of their blocks' soft matrices; None:
                no gradient.
            soft: the differentiable soft permutations, `(blocks, B, B)` for each stack of blocks.
                They receive gradients, and their values are not used. Empty: no gradient.
        """
        self._set = (perm, hard, list(soft))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., C_in)`, in the original channel order, to `(..., C_out)`."""
        if not self._learns_order:
            return _MaskedProduct.apply(x, self, None, None, *self.scores.parameters())
        assert self._set is not None
        perm, hard, soft = self._set
        self._set = None  # or the soft permutations would stay in memory until the next step
        return _MaskedProduct.apply(x, self, perm, hard, *soft)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the mask that the scores choose, bool `(C_out, C_in)`, in original order."""
        weight = self.linear.weight
        scores = saliency(weight, self.scores.at(weight.t(), slice(None)))
        mask = nm_mask(scores, self.pattern)
        return mask if self.inverse is None else mask[:, self.inverse]

    @torch.no_grad()
    def masked_weight_t(self, weight: Tensor, perm: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `(W * M)^T (C_in, C_out)`; its channels are in the order of `weight`."""
        masked_t = torch.empty(weight.t().shape, dtype=dtype, device=weight.device)
        for _, _, positions in self._pieces(weight):
            self._kernels.mask(*self._piece(masked_t, weight, perm, positions))
        return masked_t

    def order_gradients(
        self, weight: Tensor, perm: Tensor, hard: Tensor, grad_masked_t: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `(W * M)^T`, and the gradients of the soft permutations.

        Each rank makes the gradients of some blocks, from the sum of `grad_masked_t` over all
        ranks, and zeros for the other blocks. The sum over the ranks is the gradient.

        Returns:
            `(C_in, C_out)`, and `(blocks, B, B)` for each stack.
        """
        masked_t = torch.empty(weight.t().shape, dtype=grad_masked_t.dtype, device=weight.device)
        grad_soft = [
            torch.zeros(stack.count, stack.size, stack.size, dtype=dtype, device=weight.device)
            for stack in self._stacks
        ]
        for number, (index, blocks, positions) in enumerate(self._pieces(weight)):
            out, piece = self._piece(masked_t, weight, perm, positions)
            if not self._summed(piece, grad_masked_t, number % parallel.world_size()):
                self._kernels.mask(out, piece)
                continue
            size = self._stacks[index].size
            grad = self._block_gradients(out, piece, grad_masked_t, size)
            # The rows are permuted: each goes back to its source channel.
            source = hard[positions].view(-1, size, 1).expand_as(grad)
            grad_soft[index][blocks].scatter_(1, source, grad.to(dtype))
        return masked_t, grad_soft

    def _summed(self, piece: Piece, grad_masked_t: Tensor, rank: int) -> bool:
        """Sum the gradient of a piece over all ranks, in `rank`; tell whether this is `rank`."""
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
        """Mask whole blocks of channels, and return the gradient of their permutation.

        Returns:
            `(blocks, B, B)`, with permuted rows.
        """
        if self._straight_through == "swap":
            changes = self._kernels.exchanges(out, piece, grad_masked_t, size)
            return changes.repeat_interleave(piece.m, 2)
        # Sums over all rows would overflow or vanish in float16.
        dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
        hard = self._straight_through == "hard"
        parts = self._kernels.softmax_gradients(out, piece, grad_masked_t, dtype, hard)
        s, grad_s, grad_mask, mask = (part.view(-1, size, out.shape[1]) for part in parts)
        with products_as_they_are(grad_masked_t):
            return (s @ grad_s.mT).baddbmm_(grad_mask, mask.mT)

    def _piece(
        self, out: Tensor, weight: Tensor, perm: Tensor | None, positions: slice
    ) -> tuple[Tensor, Piece]:
        """Return the piece at some positions, and the tensor for its masked channels."""
        weight_t = weight.t()
        n = self.pattern.n
        m = self.pattern.m
        if perm is None:
            factors = self.scores.at(weight_t, positions)
            return out[positions], Piece(weight_t[positions], None, factors, n, m)
        channels = perm[positions]
        return out, Piece(weight_t, channels, self.scores.at(weight_t, channels), n, m)

    def _pieces(self, weight: Tensor) -> Iterator[tuple[int, slice, slice]]:
        """Split the positions into pieces of whole blocks.

        Yields:
            The index of the stack, the blocks in it, and their positions.
        """
        for index, stack in enumerate(self._stacks):
            at_once = self._kernels.piece // (stack.size * len(weight))
            step = max(1, min(at_once, -(-stack.count // parallel.world_size())))
            for first in range(0, stack.count, step):
                last = min(first + step, stack.count)
                start = stack.start + first * stack.size
                stop = stack.start + last * stack.size
                yield index, slice(first, last), slice(start, stop)


class _MaskedProduct(torch.autograd.Function):
    """Product `y = x (W * M)^T + b`, differentiable in x and in soft permutations or scores."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        module: MaskedLinear,
        perm: Tensor | None,
        hard: Tensor | None,
        *learning: Tensor,
    ) -> Tensor:
        """Multiply; `learning` are the soft permutations or the parameters of the scores."""
        dtype = product_dtype(x)
        flat = _columns_at(x.flatten(0, -2), module.order, dtype)
        weight = module.linear.weight  # kept, as the layer may leave the device before backward
        masked_t = module.masked_weight_t(weight, perm, dtype)
        y = product(flat, masked_t)
        if module.linear.bias is not None:
            y += module.linear.bias
        states = flat if learning else None
        masked_weight = masked_t if module.scores.keeps_masked else None
        ctx.save_for_backward(states, masked_weight, weight, perm, hard)
        ctx.module = module
        ctx.learning_dtype = learning[0].dtype if learning else None
        ctx.input_shape = x.shape
        ctx.input_dtype = x.dtype
        ctx.product_dtype = dtype
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, and of the soft permutations or of the scores' parameters."""
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
            grad_x = _columns_at(product(grad_y, masked_t.t()), module.inverse, ctx.input_dtype)
            grad_x = grad_x.view(ctx.input_shape)
        del masked_t  # before the gradients of the scores, which may be as large
        if x is not None and perm is None:
            grad_masked_t = product(x.t(), grad_y)
            of_learning = module.scores.gradients(grad_masked_t, weight.t(), module.pattern.m)
        return grad_x, None, None, None, *of_learning


def _columns_at(states: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `states[:, order]` in a dtype, for states `(tokens, C)`; None: all columns."""
    if order is not None:
        # torch gathers columns in half precision five times slower than in float32 on a CPU.
        if states.device.type == "cpu" and states.dtype.itemsize < 4:
            states = states.float()
        states = states.index_select(1, order)
    return states.to(dtype)
