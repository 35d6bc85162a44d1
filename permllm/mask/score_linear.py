"""Linear layer with an N:M mask whose scores learn under a fixed permutation.

Each group of M keeps the weights with the N largest scores. The straight-through gradient of a
score is the gradient of its mask entry, `dL/dM = dL/d(W M) * W`, for kept and pruned weights alike.
It says how the loss changes, to first order, if the weight is kept. The mask depends only on
differences between the scores of a group, so the mean gradient of the group is subtracted:

    dS[c, r] = D[c, r] - (1 / M) sum_{c' in group of c} D[c', r]        D = dL/d(W M) * W

The weight and its scores are stored permuted, and the inputs are permuted instead, because they are
small. Tensors are transposed, `(C_in, C_out)`: a row is a channel.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from permllm.runtime.precision import product_dtype
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency, saliency_t
from permllm.training.elementwise import ChannelChunk
from permllm.training.kernels import EAGER, Kernels


class Scores(nn.Module, ABC):
    """Base of the scores of a linear's weights.

    Attributes:
        keeps_masked: forward keeps the masked weight for backward, because the scores take more
            memory than it does.
    """

    keeps_masked = False

    @abstractmethod
    def chunk_scores(self, weight_t: Tensor, channels: slice) -> SaliencyFactors:
        """Return the scores of consecutive channels of `weight_t (C_in, C_out)`, as a dense score.

        They have the dtype in which the gradients are computed.
        """

    @abstractmethod
    def parameter_gradients(self, score_gradient: Tensor) -> list[Tensor]:
        """Return the gradients of the parameters from that of the scores, `(C_in, C_out)`."""


def score_gradients(grad_masked_t: Tensor, weight_t: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """Return the gradients of the scores in a dtype, `(C_in, C_out)` as both tensors."""
    # A copy is multiplied in place, because on a CPU another tensor of this size takes several
    # times as long as the product.
    if grad_masked_t.dtype == dtype:
        gradients = grad_masked_t * weight_t
    else:
        gradients = grad_masked_t.to(dtype).mul_(weight_t)
    groups = gradients.unflatten(0, (-1, m))
    groups -= groups.mean(1, keepdim=True)
    return gradients


def log_saliency_t(weight_t: Tensor, factors: SaliencyFactors) -> Tensor:
    """Return the log saliency of a transposed weight, same shape; finite where a weight is zero."""
    scores = saliency_t(weight_t, factors)
    # Not in place, because the saliency may share memory with a dense score.
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log_()


class ScoreLinear(nn.Module):
    """Linear in the place of a frozen `nn.Linear` while the scores of its mask learn.

    Args:
        linear: the layer; its weight `(C_out, C_in)` is permuted and gets no gradient.
        scores: scores that choose the mask, permuted like the weight.
        permutation: int64 `(C_in,)`, of the dense model's columns (`weight[:, permutation]`); None:
            the identity.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scores: Scores,
        pattern: NMPattern,
        permutation: Tensor | None = None,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scores = scores
        self.pattern = pattern
        self.permutation = permutation
        self.inverse = None if permutation is None else permutation.argsort()
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., C_in)`, in the original channel order, to `(..., C_out)`."""
        y: Tensor = _ScoreProduct.apply(x.flatten(0, -2), self, *self.scores.parameters())
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the mask that the scores choose, bool `(C_out, C_in)`, in original order."""
        mask = self.permuted_mask()
        return mask if self.inverse is None else mask[:, self.inverse]

    def permuted_mask(self) -> Tensor:
        """Return the mask that the scores choose, bool `(C_out, C_in)`, in permuted order."""
        weight = self.linear.weight
        scores = self.scores.chunk_scores(weight.t(), slice(None))
        return nm_mask(saliency(weight, scores), self.pattern)

    @torch.no_grad()
    def masked_weight_t(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `(W * M)^T (C_in, C_out)`, permuted."""
        weight_t = weight.t()
        masked_t = torch.empty(weight_t.shape, dtype=dtype, device=weight.device)
        m = self.pattern.m
        step = m * max(1, self._kernels.chunk_size // (m * len(weight)))
        for first in range(0, len(weight_t), step):
            channels = slice(first, first + step)
            factors = self.scores.chunk_scores(weight_t, channels)
            chunk = ChannelChunk(weight_t[channels], None, factors, self.pattern.n, m)
            self._kernels.mask(masked_t[channels], chunk)
        return masked_t


class _ScoreProduct(torch.autograd.Function):
    """Product `y = x (W * M)^T + b`, differentiable in x and in the parameters of the scores."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: ScoreLinear, *parameters: Tensor) -> Tensor:
        """Multiply `x (tokens, C_in)`."""
        states = _columns_at(x, module.permutation, product_dtype(x))
        weight = module.linear.weight  # kept, as the layer may leave the device before backward
        masked_t = module.masked_weight_t(weight, states.dtype)
        ctx.save_for_backward(states, masked_t if module.scores.keeps_masked else None, weight)
        ctx.module = module
        ctx.score_dtype = parameters[0].dtype
        ctx.input_dtype = x.dtype
        y = states @ masked_t
        return y if module.linear.bias is None else y.add_(module.linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the parameters."""
        states, masked_t, weight = ctx.saved_tensors
        module: ScoreLinear = ctx.module
        grad_y = grads[0]
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            if masked_t is None:
                masked_t = module.masked_weight_t(weight, grad_y.dtype)
            grad_x = _columns_at(grad_y @ masked_t.t(), module.inverse, ctx.input_dtype)
        del masked_t  # before the gradients of the scores, which may be as large
        grad_masked_t = states.t() @ grad_y
        score_gradient = score_gradients(
            grad_masked_t, weight.t(), module.pattern.m, ctx.score_dtype
        )
        return grad_x, None, *module.scores.parameter_gradients(score_gradient)


def _columns_at(states: Tensor, permutation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `states[:, permutation]` in a dtype, for states `(tokens, C)`; None: all columns."""
    if permutation is not None:
        # torch gathers columns in half precision five times slower than in float32 on a CPU.
        if states.device.type == "cpu" and states.dtype.itemsize < 4:
            states = states.float()
        states = states.index_select(1, permutation)
    return states.to(dtype)
