"""Kernels of a masked linear: eager, compiled by Inductor on a CPU, or in Triton on a GPU."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from permllm.runtime.compiling import attempted, compiled
from permllm.settings.config import NMPattern
from permllm.training.elementwise import (
    Piece,
    joining,
    masked_piece,
    softmax_gradients,
    thresholds,
    with_own,
)

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
        piece: number of weights in a piece, so small that its temporaries stay in a core's cache.
    """

    def __init__(self, compile_: bool = False) -> None:
        functions: list[Callable[..., Any]] = [masked_piece, softmax_gradients, thresholds, joining]
        if compile_:
            failure = "learning runs without a compiled kernel"
            functions = [compiled(function, failure) for function in functions]
        self._masked, self._softmax_gradients, self._thresholds, self._joining = functions
        self.piece = 1 << 20 if compile_ else 1 << 17
        # Eager code would allocate a tensor that compares the channels with all groups.
        self._all_groups_at_once = compile_

    def mask(self, out: Tensor, piece: Piece) -> None:
        """Write the piece times its N:M mask into its rows of `out (C_in, C_out)`."""
        _write(out, piece, self._masked(piece, out.dtype))

    def exchanges(self, out: Tensor, piece: Piece, grad: Tensor, size: int) -> Tensor:
        """Do as `mask`, and return how the loss changes when channels change groups.

        The changes are of first order: the loss counts as linear in the mask.

        Args:
            out, piece: as in `mask`.
            grad: gradient of the masked `weight_t`, `(C_in, C_out)`.
            size: B, the number of channels in a block.

        Returns:
            `(k / B, B, B / M)`, for each channel of a block and each group of the block: the change
            if the channel replaces a random member. For its own group it is the change if the
            channel stays, relative to its removal.
        """
        masked, saliency, gradient, limits, stay = self._thresholds(piece, grad, out.dtype)
        _write(out, piece, masked)
        blocks = len(saliency) // size
        count = size // piece.m
        s = saliency.view(blocks, size, -1)
        d = gradient.view(blocks, size, -1)
        groups = [part.view(blocks, count, -1) for part in limits]
        step = count if self._all_groups_at_once else 1
        parts = []
        for first in range(0, count, step):
            some = tuple(part[:, first : first + step] for part in groups)
            parts.append(self._joining(s, d, some, piece.n / piece.m))
        return with_own(torch.cat(parts, 2), stay, piece.m)

    def softmax_gradients(
        self, out: Tensor, piece: Piece, grad: Tensor, dtype: torch.dtype, hard: bool
    ) -> list[Tensor]:
        """Do as `mask`, and return the other four results of `softmax_gradients`."""
        masked, *others = self._softmax_gradients(piece, grad, dtype, hard)
        _write(out, piece, masked)
        return others


class GPUKernels(Kernels):
    """Triton kernels for masks and exchanges; without Triton or a driver, the eager functions."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = 1 << 25  # so large that the work hides the launches
        self._fast_mask = attempted(_triton_mask, "masks are made without a Triton kernel")
        self._fast_exchanges = attempted(
            _triton_exchanges, "exchanges are computed without a Triton kernel"
        )

    @override
    def mask(self, out: Tensor, piece: Piece) -> None:
        """Do as the base, in one launch for float32 factors."""
        if piece.factors.column.dtype != torch.float32 or self._fast_mask(out, piece) is None:
            super().mask(out, piece)

    @override
    def exchanges(self, out: Tensor, piece: Piece, grad: Tensor, size: int) -> Tensor:
        """Do as the base, in two launches for float32 factors."""
        fast = None
        if piece.factors.column.dtype == torch.float32:
            fast = self._fast_exchanges(out, piece, grad, size)
        return super().exchanges(out, piece, grad, size) if fast is None else fast


def _write(out: Tensor, piece: Piece, masked: Tensor) -> None:
    """Write a masked piece into its rows of `out`, in the dtype of `out`."""
    if piece.channels is None:
        out.copy_(masked)
    else:
        out.index_copy_(0, piece.channels, masked.to(out.dtype))


def _triton_mask(out: Tensor, piece: Piece) -> Tensor:
    from permllm.training.triton_kernels import mask  # Triton may be missing

    return mask(out, piece)


def _triton_exchanges(out: Tensor, piece: Piece, grad: Tensor, size: int) -> Tensor:
    from permllm.training.triton_kernels import exchanges

    return exchanges(out, piece, grad, size)


EAGER = Kernels()
COMPILED = Kernels(compile_=True)
ON_GPU = GPUKernels()


def chosen_kernels(
    device: torch.device, compile_: bool | None, work: float, patterns: Iterable[NMPattern]
) -> Kernels:
    """Return the kernels for a device.

    Args:
        device: device of the weights; only kernels for a CPU are compiled.
        compile_: True compiles, False does not; None: compile if `work` is large enough.
        work: number of weights times number of steps.
        patterns: N:M of the masks.
    """
    if device.type != "cpu":
        return ON_GPU
    wanted = work > _COMPILE_FROM if compile_ is None else compile_
    fits = all(pattern.m <= _COMPILE_UP_TO for pattern in patterns)
    return COMPILED if wanted and fits else EAGER
