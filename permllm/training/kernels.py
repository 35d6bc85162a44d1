"""Kernels of a masked linear: elementwise functions, eager, compiled by Inductor on a CPU, or in Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern
from permllm.runtime.compiling import attempted, compiled
from permllm.training.elementwise import (
    Piece,
    Thresholds,
    joining,
    masked_piece,
    softmax_gradients,
    thresholds,
    with_own,
)

# Weights times steps from which compiling pays on a CPU: it takes 10 to 20 s and saves some 100 ns
# a weight and step.
_COMPILE_FROM = 4e8
# With more channels in a group a CPU runs out of registers, and compiled code is slower than eager
# code.
_COMPILE_UP_TO = 8


class Kernels:
    """Functions of `permllm.training.elementwise` as a masked linear calls them: eagerly, or compiled for a CPU.

    Attributes:
        piece: number of weights to pass at a time: the temporaries of a dozen passes should stay in
            a core's cache, and a GPU needs enough to hide its launches.
    """

    def __init__(self, compile_: bool = False) -> None:
        self.piece = 1 << 20 if compile_ else 1 << 17
        self._groups = (
            None if compile_ else 1
        )  # a tensor of all groups exists in a compiler's mind only
        functions: list[Callable[..., Any]] = [masked_piece, softmax_gradients, thresholds, joining]
        if compile_:
            functions = [
                compiled(function, "learning runs without a compiled kernel")
                for function in functions
            ]
        self._masked, self._softmax_gradients, self._thresholds, self._joining = functions

    def mask(self, out: Tensor, piece: Piece, n: int, m: int) -> None:
        """Write the piece times its N:M mask into its rows of `out (C_in, C_out)`, whose dtype may be another."""
        self._write(out, piece, self._masked(piece, n, m, out.dtype))

    def exchanges(
        self, out: Tensor, piece: Piece, grad: Tensor, n: int, m: int, size: int
    ) -> Tensor:
        """Do as `mask`, and return how the loss, linear in the mask, changes when channels change groups.

        Args:
            out, piece, n, m: as in `mask`.
            grad: of the masked weight_t, `(C_in, C_out)`.
            size: B, channels of a block.

        Returns:
            `(k / B, B, B / M)`: for each channel of a block and each group of the block the change
            if the channel took the place of a random member, and for its own group the change if it
            stayed instead of being taken away.
        """
        found: Thresholds = self._thresholds(piece, grad, n, m, out.dtype)
        self._write(out, piece, found.masked)
        s, d, *groups = (
            part.view(len(found.saliency) // size, -1, part.shape[-1]) for part in found[1:7]
        )
        step = self._groups or size // m
        parts = [
            self._joining(s, d, tuple(part[:, first : first + step] for part in groups), n / m)
            for first in range(0, size // m, step)
        ]
        return with_own(torch.cat(parts, 2), found.stay, m)

    def softmax_gradients(
        self,
        out: Tensor,
        piece: Piece,
        grad: Tensor,
        n: int,
        m: int,
        dtype: torch.dtype,
        hard: bool,
    ) -> tuple[Tensor, ...]:
        """Do as `mask`, and return the other results of `softmax_gradients` in `dtype`."""
        masked, *others = self._softmax_gradients(piece, grad, n, m, dtype, hard)
        self._write(out, piece, masked)
        return tuple(others)

    def _write(self, out: Tensor, piece: Piece, masked: Tensor) -> None:
        if piece.channels is None:
            out.copy_(masked)
        else:
            out.index_copy_(0, piece.channels, masked.to(out.dtype))


class GPUKernels(Kernels):
    """Triton kernels for masks and exchanges; the eager functions where there is no Triton, or no driver."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = 1 << 25
        self._fast_mask = attempted(_triton_mask, "masks are made without a Triton kernel")
        self._fast_exchanges = attempted(
            _triton_exchanges, "exchanges are valued without a Triton kernel"
        )

    @override
    def mask(self, out: Tensor, piece: Piece, n: int, m: int) -> None:
        if piece.column.dtype != torch.float32 or self._fast_mask(out, piece, n, m) is None:
            super().mask(out, piece, n, m)

    @override
    def exchanges(
        self, out: Tensor, piece: Piece, grad: Tensor, n: int, m: int, size: int
    ) -> Tensor:
        fast = (
            None
            if piece.column.dtype != torch.float32
            else self._fast_exchanges(out, piece, grad, n, m, size)
        )
        return super().exchanges(out, piece, grad, n, m, size) if fast is None else fast


def _triton_mask(out: Tensor, piece: Piece, n: int, m: int) -> Tensor:
    from permllm.training.triton_kernels import mask  # there may be no Triton

    return mask(out, piece, n, m)


def _triton_exchanges(out: Tensor, piece: Piece, grad: Tensor, n: int, m: int, size: int) -> Tensor:
    from permllm.training.triton_kernels import exchanges

    return exchanges(out, piece, grad, n, m, size)


EAGER = Kernels()
COMPILED = Kernels(compile_=True)
ON_GPU = GPUKernels()


def chosen_kernels(
    device: torch.device, compile_: bool | None, work: float, patterns: Iterable[NMPattern]
) -> Kernels:
    """Return the kernels for a device: on a CPU compiled ones where that is asked for, or soon made up for.

    Args:
        device: of the weights.
        compile_: True and False decide; None compiles where the work is enough.
        work: weights times steps.
        patterns: N:M of the masks.
    """
    if device.type != "cpu":
        return ON_GPU
    wanted = work > _COMPILE_FROM if compile_ is None else compile_
    return (
        COMPILED if wanted and all(pattern.m <= _COMPILE_UP_TO for pattern in patterns) else EAGER
    )
