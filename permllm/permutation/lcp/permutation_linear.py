"""Linear layer with an N:M mask whose permutation learns (PermLLM, section 4).

Let `W (C_out, C_in)` be the weight, `S` its saliency of the same shape, `P (C_in, C_in)` the
permutation and `S' = S P`. The layer computes

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

Masks are made in the transposed layout `(C_in, C_out)`: a channel is a contiguous row, a
permutation gathers rows, and a group of M is M consecutive rows. Forward keeps neither saliency nor
mask for backward, which recomputes both, a chunk of channels at a time. All products have one
dtype: that of the weights, or autocast's inside of `permllm.runtime.precision.products_in`.
Saliencies and masks use the weights in their own dtype.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permllm.permutation.foldable import BlockStack
from permllm.runtime import parallel
from permllm.runtime.precision import product_dtype, products_as_they_are
from permllm.settings.config import NMPattern
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.elementwise import ChannelChunk
from permllm.training.kernels import EAGER, Kernels

StraightThrough = Literal["swap", "hard", "soft"]


class PermutationLinear(nn.Module):
    """Linear in the place of a frozen `nn.Linear` while the permutation of its mask learns.

    Args:
        linear: the layer; its weight `(C_out, C_in)` gets no gradient. A contiguous `weight.t()` is
            fastest, because channels are gathered.
        factors: factors of the saliency that chooses the mask.
        stacks: blocks of the permutation; `set_permutation` sets it before each forward.
        straight_through: gradient of the permutation, see above.
    """

    def __init__(
        self,
        linear: nn.Linear,
        factors: SaliencyFactors,
        pattern: NMPattern,
        stacks: list[BlockStack],
        straight_through: StraightThrough = "swap",
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.factors = factors.by_channel()
        self.pattern = pattern
        self._stacks = stacks
        self._straight_through = straight_through
        self._kernels = kernels
        self._present: tuple[Tensor, Tensor | None, Sequence[Tensor]] | None = None

    def set_permutation(
        self, permutation: Tensor, hard: Tensor | None = None, soft: Sequence[Tensor] = ()
    ) -> None:
        """Set the permutation for the next forward alone.

        Args:
            permutation: int64 `(C_in,)`, the channel at each permuted position.
            hard: int64 `(C_in,)`, the same channels as rows of their blocks' soft matrices; None:
                no gradient.
            soft: placeholders of the soft permutations, `(blocks, B, B)` for each stack, that
                receive their gradients; empty: no gradient.
        """
        self._present = (permutation, hard, soft)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., C_in)`, in the original channel order, to `(..., C_out)`."""
        assert self._present is not None
        permutation, hard, soft = self._present
        # A decoder layer passes no permutation on, so it waits here from `set_permutation` until
        # this forward. Kept longer, it would hold the gradients of the soft permutations in memory,
        # which are as large as the logits, during the next step.
        self._present = None
        states = x.flatten(0, -2).to(product_dtype(x))
        y: Tensor = _PermutationProduct.apply(states, self, permutation, hard, *soft)
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def masked_weight_t(self, weight: Tensor, permutation: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `(W * M)^T (C_in, C_out)`, in the original channel order."""
        masked_t = torch.empty(weight.t().shape, dtype=dtype, device=weight.device)
        for _, _, positions in self._chunks(weight):
            self._kernels.mask(masked_t, self._chunk(weight, permutation[positions]))
        return masked_t

    def gradients(
        self,
        weight: Tensor,
        permutation: Tensor,
        hard: Tensor,
        grad_masked_t: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `(W * M)^T (C_in, C_out)`, and the gradients of each stack, `(blocks, B, B)`.

        Each rank makes the gradients of some blocks, from the sum of `grad_masked_t` over all
        ranks, and zeros for the others. The sum over the ranks is the gradient. All ranks run the
        same graph, so that they meet in one order.
        """
        masked_t = torch.empty(weight.t().shape, dtype=grad_masked_t.dtype, device=weight.device)
        grad_soft = [
            torch.zeros(stack.count, stack.size, stack.size, dtype=dtype, device=weight.device)
            for stack in self._stacks
        ]
        for number, (index, blocks, positions) in enumerate(self._chunks(weight)):
            chunk = self._chunk(weight, permutation[positions])
            if not _summed(chunk, grad_masked_t, number % parallel.world_size()):
                self._kernels.mask(masked_t, chunk)
                continue
            size = self._stacks[index].size
            grad = self._block_gradients(masked_t, chunk, grad_masked_t, size)
            # The rows are permuted: each goes back to its source channel.
            source = hard[positions].view(-1, size, 1).expand_as(grad)
            grad_soft[index][blocks].scatter_(1, source, grad.to(dtype))
        return masked_t, grad_soft

    def _block_gradients(
        self, masked_t: Tensor, chunk: ChannelChunk, grad_masked_t: Tensor, size: int
    ) -> Tensor:
        """Mask whole blocks; return their gradient, `(blocks, B, B)` with permuted rows."""
        if self._straight_through == "swap":
            changes = self._kernels.swap_gradient(masked_t, chunk, grad_masked_t, size)
            return changes.repeat_interleave(chunk.m, 2)
        # Sums over all rows would overflow or vanish in float16.
        dtype = torch.float32 if masked_t.dtype == torch.float16 else masked_t.dtype
        hard = self._straight_through == "hard"
        parts = self._kernels.softmax_gradients(masked_t, chunk, grad_masked_t, dtype, hard)
        s, grad_s, grad_mask, mask = (part.view(-1, size, part.shape[1]) for part in parts)
        with products_as_they_are(grad_masked_t):
            return (s @ grad_s.mT).baddbmm_(grad_mask, mask.mT)

    def _chunk(self, weight: Tensor, channels: Tensor) -> ChannelChunk:
        factors = self.factors.permuted(channels)
        return ChannelChunk(weight.t(), channels, factors, self.pattern.n, self.pattern.m)

    def _chunks(self, weight: Tensor) -> Iterator[tuple[int, slice, slice]]:
        """Yield chunks of whole blocks: index of the stack, blocks in it, and their positions."""
        for index, stack in enumerate(self._stacks):
            at_once = self._kernels.chunk_size // (stack.size * len(weight))
            step = max(1, min(at_once, -(-stack.count // parallel.world_size())))
            for first in range(0, stack.count, step):
                last = min(first + step, stack.count)
                start = stack.start + first * stack.size
                stop = stack.start + last * stack.size
                yield index, slice(first, last), slice(start, stop)


def _summed(chunk: ChannelChunk, grad_masked_t: Tensor, rank: int) -> bool:
    """Sum the gradient of a chunk over all ranks in `rank`; tell whether this is `rank`."""
    if parallel.world_size() == 1:
        return True
    assert chunk.channels is not None
    rows = chunk.of(grad_masked_t)
    parallel.reduce(rows, rank)
    if parallel.rank() != rank:
        return False
    grad_masked_t.index_copy_(0, chunk.channels, rows)
    return True


class _PermutationProduct(torch.autograd.Function):
    """Product `x (W * M)^T + b`, differentiable in x and in the soft permutations."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        module: PermutationLinear,
        permutation: Tensor,
        hard: Tensor | None,
        *soft: Tensor,
    ) -> Tensor:
        """Multiply states `(tokens, C_in)`."""
        weight = module.linear.weight  # kept, as the layer may leave the device before backward
        masked_t = module.masked_weight_t(weight, permutation, states.dtype)
        ctx.save_for_backward(states if soft else None, weight, permutation, hard)
        ctx.module = module
        ctx.soft_dtype = soft[0].dtype if soft else None
        y = states @ masked_t
        return y if module.linear.bias is None else y.add_(module.linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the states and of the soft permutations."""
        states, weight, permutation, hard = ctx.saved_tensors
        module: PermutationLinear = ctx.module
        grad_y = grads[0]
        grad_soft: list[Tensor] = []
        if states is None:
            masked_t = module.masked_weight_t(weight, permutation, grad_y.dtype)
        else:
            grad_masked_t = states.t() @ grad_y
            masked_t, grad_soft = module.gradients(
                weight, permutation, hard, grad_masked_t, ctx.soft_dtype
            )
        grad_states = grad_y @ masked_t.t() if ctx.needs_input_grad[0] else None
        return grad_states, None, None, None, *grad_soft
