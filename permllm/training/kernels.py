"""Kernels of a masked linear: eager, compiled by Inductor on a CPU, or in Triton on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.runtime.compiling import compiled, with_fallback
from permllm.settings.learning import LearningSettings
from permllm.training.elementwise import (
    ChannelChunk,
    masked_chunk,
    softmax_gradients,
    swap_changes,
    swap_thresholds,
    with_own,
)
from permllm.training.problem import LearningProblem

# Weights times steps from which compiling saves time on a CPU: it takes 10 to 20 s, and saves about
# 100 ns for each weight in each step.
_COMPILE_FROM = 4e8
# Largest M to compile for: with a larger M a CPU runs out of registers, and eager code is faster.
_COMPILE_UP_TO = 8


class Kernels:
    """Functions of `permllm.training.elementwise` as a masked linear calls them.

    Args:
        compile_: compile the functions for a CPU, at their first call.

    Attributes:
        chunk_size: number of weights in a chunk, so small that its temporaries stay in a core's
            cache.
    """

    def __init__(self, compile_: bool = False) -> None:
        def ready(function: Callable[..., Any]) -> Callable[..., Any]:
            if not compile_:
                return function
            return compiled(function, "learning runs without a compiled kernel")

        self._masked = ready(masked_chunk)
        self._softmax_gradients = ready(softmax_gradients)
        self._swap_thresholds = ready(swap_thresholds)
        self._swap_changes = ready(swap_changes)
        self.chunk_size = 1 << 20 if compile_ else 1 << 17
        # Eager code would allocate a tensor that compares the channels with all groups.
        self._all_groups_at_once = compile_

    def mask(self, out: Tensor, chunk: ChannelChunk) -> None:
        """Write the chunk times its N:M mask into its rows of `out (C_in, C_out)`."""
        _write(out, chunk, self._masked(chunk, out.dtype))

    def swap_gradient(self, out: Tensor, chunk: ChannelChunk, grad: Tensor, size: int) -> Tensor:
        """Write the mask as `mask` does, and return the first-order loss change of each swap.

        Args:
            out, chunk: as in `mask`.
            grad: gradient of the masked `weight_t`, `(C_in, C_out)`.
            size: B, the number of channels in a block.

        Returns:
            `(k / B, B, B / M)`, the change if a channel replaces a random member of a group of its
            block; for its own group, if it stays, relative to its removal.
        """
        masked, saliency, gradient, thresholds, stay = self._swap_thresholds(chunk, grad, out.dtype)
        _write(out, chunk, masked)
        blocks = len(saliency) // size
        count = size // chunk.m
        s = saliency.view(blocks, size, -1)
        d = gradient.view(blocks, size, -1)
        groups = [part.view(blocks, count, -1) for part in thresholds]
        step = count if self._all_groups_at_once else 1
        parts = []
        for first in range(0, count, step):
            some = tuple(part[:, first : first + step] for part in groups)
            parts.append(self._swap_changes(s, d, some, chunk.n / chunk.m))
        return with_own(torch.cat(parts, 2), stay, chunk.m)

    def softmax_gradients(
        self, out: Tensor, chunk: ChannelChunk, grad: Tensor, dtype: torch.dtype, hard: bool
    ) -> list[Tensor]:
        """Do as `mask`, and return the other four results of `softmax_gradients`."""
        masked, *others = self._softmax_gradients(chunk, grad, dtype, hard)
        _write(out, chunk, masked)
        return others


class GPUKernels(Kernels):
    """Triton kernels for masks and swap gradients; without Triton, the eager functions."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk_size = 1 << 25  # so large that the work hides the launches
        self._fast_mask = with_fallback(_triton_mask, "masks are made without a Triton kernel")
        self._fast_swap = with_fallback(
            _triton_swap_gradient, "gradients of swaps are computed without a Triton kernel"
        )

    @override
    def mask(self, out: Tensor, chunk: ChannelChunk) -> None:
        """Do as the base, in one launch for float32 factors."""
        if chunk.factors.column.dtype != torch.float32 or self._fast_mask(out, chunk) is None:
            super().mask(out, chunk)

    @override
    def swap_gradient(self, out: Tensor, chunk: ChannelChunk, grad: Tensor, size: int) -> Tensor:
        """Do as the base, in two launches for float32 factors."""
        fast = None
        if chunk.factors.column.dtype == torch.float32:
            fast = self._fast_swap(out, chunk, grad, size)
        return super().swap_gradient(out, chunk, grad, size) if fast is None else fast


def _write(out: Tensor, chunk: ChannelChunk, masked: Tensor) -> None:
    if chunk.channels is None:
        out.copy_(masked)
    else:
        out.index_copy_(0, chunk.channels, masked.to(out.dtype))


def _triton_mask(out: Tensor, chunk: ChannelChunk) -> Tensor:
    from permllm.training.triton_kernels import mask  # Triton may be missing

    return mask(out, chunk)


def _triton_swap_gradient(out: Tensor, chunk: ChannelChunk, grad: Tensor, size: int) -> Tensor:
    from permllm.training.triton_kernels import swap_gradient

    return swap_gradient(out, chunk, grad, size)


EAGER = Kernels()
COMPILED = Kernels(compile_=True)
ON_GPU = GPUKernels()


def chosen_kernels(
    settings: LearningSettings, problem: LearningProblem, groups: list[ChannelGroup]
) -> Kernels:
    """Return the kernels for the linears of groups that learn together.

    Only kernels for a CPU are compiled, if the settings ask for it, or else if it saves time.
    """
    if problem.device.type != "cpu":
        return ON_GPU
    weights = sum(group.channels * sum(group.rows) for group in groups)
    wanted = settings.compile
    if wanted is None:
        wanted = weights * settings.steps_for(len(problem.tokens)) > _COMPILE_FROM
    return COMPILED if wanted and problem.pattern.m <= _COMPILE_UP_TO else EAGER
