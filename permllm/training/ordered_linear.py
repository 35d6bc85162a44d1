"""The linear layer that scores of a mask are learned in, while the order of its channels is fixed.

Nothing of a weight's size moves: the weight and its scores are stored in the order meanwhile, transposed, so that a group of M
is M consecutive rows, and the activations, which are small, are permuted instead. Otherwise as `masked_linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.models.families import ChannelGroup
from permllm.runtime.precision import product, product_dtype
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency_t
from permllm.training.kernels import EAGER, Kernels
from permllm.training.masked_linear import standing_in
from permllm.training.problem import LearningProblem
from permllm.training.scores import Scores


class _OrderedMaskedLinear(torch.autograd.Function):
    """`y = x[order] (W * mask)^T + b`, differentiable in x and, straight through, in what the mask is chosen by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: OrderedMaskedLinear, *learning: Tensor) -> Tensor:
        dtype = product_dtype(x)
        flat = _columns_at(x.flatten(0, -2), module.order, dtype)
        masked_t = module.masked_weight_t(dtype)
        y = product(flat, masked_t)
        if module.linear.bias is not None:
            y += module.linear.bias
        # The weight itself: the module's own may have left the device by then.
        weight = module.linear.weight
        ctx.save_for_backward(flat if learning else None, masked_t if module.scores.keeps_masked else None, weight)
        ctx.module, ctx.learning = module, len(learning)
        ctx.input_shape, ctx.input_dtype, ctx.product_dtype = x.shape, x.dtype, dtype
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, masked_t, weight = ctx.saved_tensors
        module: OrderedMaskedLinear = ctx.module
        grad_y = grads[0].flatten(0, -2)
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            if masked_t is None:
                masked_t = module.masked_weight_t(ctx.product_dtype, weight)
            grad_x = _columns_at(product(grad_y, masked_t.t()), module.inverse, ctx.input_dtype).view(ctx.input_shape)
        del masked_t  # before the gradients of the scores, which may be as large
        if not ctx.learning:
            return grad_x, None
        grad_masked_t = product(x.t(), grad_y)
        return grad_x, None, *module.scores.gradients(grad_masked_t, weight.t(), module.pattern.m)


def _columns_at(states: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(tokens, C)`, the columns in an order int64 `(C,)`, in a format."""
    if order is not None:
        # torch gathers columns in half precision five times slower than in float32 on a CPU.
        widened = states.float() if states.device.type == "cpu" and states.dtype.itemsize < 4 else states
        states = widened.index_select(1, order)
    return states.to(dtype)


class OrderedMaskedLinear(nn.Module):
    """Stands in for a frozen `nn.Linear` while the scores of its mask are learned.

    Args:
        linear: the layer; its weight `(C_out, C_in)` is stored in the order: `weight[:, order]` of the dense model, with
            `weight.t()` contiguous. It gets no gradient.
        scores: what the mask is chosen by, in the order too; their parameters learn where they require gradients.
        pattern: N:M.
        order: int64 `(C_in,)`; None is that of the dense model.
        kernels: of the elementwise work, eager or compiled.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scores: Scores,
        pattern: NMPattern,
        order: Tensor | None,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scores = scores
        self.pattern = pattern
        self.order = order
        self.inverse = None if order is None else order.argsort()
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., C_in)`, in the dense model's order, to `(..., C_out)`."""
        learning = [values for values in self.scores.parameters() if values.requires_grad and torch.is_grad_enabled()]
        return _OrderedMaskedLinear.apply(x, self, *learning)

    @torch.no_grad()
    def masked_weight_t(self, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
        """`(W * mask)^T`, `(C_in, C_out)`, in the order; of the weight that is given where the module's own is not there."""
        weight_t = (self.linear.weight if weight is None else weight).t()
        channels, rows = weight_t.shape
        n, m = self.pattern.n, self.pattern.m
        masked_t = torch.empty(channels, rows, dtype=dtype, device=weight_t.device)
        step = m * max(1, self.kernels.piece(weight_t.device.type) // (m * rows))
        for first in range(0, channels, step):
            part = slice(first, first + step)
            scores = saliency_t(weight_t[part], SaliencyFactors(*self.scores.piece(weight_t, part)))
            masked_t[part] = self.kernels.select(weight_t[part], scores, n, m, dtype)
        return masked_t

    @torch.no_grad()
    def mask(self) -> Tensor:
        """The mask as it is now: bool `(C_out, C_in)`, in the dense model's order."""
        found = nm_mask(self.scores.values_t(self.linear.weight.t()).t(), self.pattern)
        return found if self.inverse is None else found[:, self.inverse]


@contextmanager
def ordered_linears(
    problem: LearningProblem,
    groups: Iterable[ChannelGroup],
    orders: Mapping[str, Tensor],
    scores_of: Callable[[Tensor, SaliencyFactors], Scores],
    kernels: Kernels = EAGER,
) -> Iterator[dict[str, list[OrderedMaskedLinear]]]:
    """Put a masked linear in the place of every linear of some groups, and the linears back at the end.

    Args:
        problem: whose model.
        groups: whose linears.
        orders: int64 `(C_in,)` by group.
        scores_of: what a mask is chosen by, from the weight `(C_out, C_in)` of a linear and its saliency factors, both in the
            order.
        kernels: as in `OrderedMaskedLinear`.

    Yields:
        The masked linears by the name of their group.
    """

    def stand_in(group: ChannelGroup, path: str, linear: nn.Linear) -> OrderedMaskedLinear:
        order = orders[group.name].to(linear.weight.device)
        scores = scores_of(ordered(group, linear.weight.data), problem.factors_of(path).permuted(order))
        moved = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
        return OrderedMaskedLinear(linear, scores, problem.pattern_of(group), moved, kernels)

    @cache  # layers that come and go ask for it each time
    def on(device: torch.device, name: str) -> Tensor:
        return orders[name].to(device)

    def ordered(group: ChannelGroup, weight: Tensor) -> Tensor:
        return weight.t()[on(weight.device, group.name)].t()

    def back(group: ChannelGroup, weight: Tensor) -> Tensor:
        return weight.t()[on(weight.device, group.name).argsort()].t().contiguous()

    with standing_in(problem.model, groups, stand_in, ordered, back) as masked:
        yield masked
