"""Masks with one bit an entry, and checks of permutations and masks."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permllm.config import NMPattern


def is_permutation(order: Tensor) -> bool:
    """Return whether a tensor `(C_in,)` of whole numbers holds each number from 0 on once."""
    if order.dim() != 1 or order.is_floating_point():
        return False
    return torch.equal(
        order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)
    )


def violations(weight: Tensor, perm: Tensor | None, pattern: NMPattern) -> int:
    """Return the number of groups of M, in permuted order, that hold more than N nonzeros.

    Args:
        weight: `(C_out, C_in)`, original channel order.
        perm: int64 `(C_in,)`; None leaves the channels as they are.
    """
    kept = weight != 0
    groups = (kept if perm is None else kept[:, perm]).unflatten(-1, (-1, pattern.m))
    counts = torch.zeros(
        groups.shape[:-1], dtype=torch.int16, device=weight.device
    )  # as a sum it would take 8 bytes each
    for entries in groups.unbind(-1):
        counts += entries
    return int((counts > pattern.n).sum())


def packed_mask(mask: Tensor) -> Tensor:
    """Return a mask on the CPU with one bit an entry: uint8 `(bytes,)`, row by row, the first in the highest bit."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def unpacked_mask(bits: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a mask that `packed_mask` has packed, bool.

    Args:
        bits: uint8 `(bytes,)` on the CPU.
        shape: of the mask; None leaves the entries in one row, to the end of the last byte.
    """
    count = None if shape is None else math.prod(shape)
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool))
    return mask if shape is None else mask.view(*shape)


class PackedMasks(UserDict[str, Tensor]):
    """Masks by name that take one bit an entry, or none where they lie in a file; each is unpacked when it is asked for.

    A mask that was returned is a copy: set it again to change it.

    Args:
        masks: bool on the CPU, of any shape, by name.
    """

    data: dict[str, Any]  # bits, or a function that reads them, and shape

    def __getitem__(self, name: str) -> Tensor:
        return unpacked_mask(*self.packed(name))

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self.set_packed(name, packed_mask(mask), mask.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"data": {name: self.packed(name) for name in self}}  # no files of another process

    def packed(self, name: str) -> tuple[Tensor, torch.Size]:
        """Return a mask as `packed_mask` gives it, and its shape."""
        bits, shape = self.data[name]
        return bits if isinstance(bits, Tensor) else bits(), shape

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a mask, `(C_out, C_in)` for a linear."""
        shape: torch.Size = self.data[name][1]
        return shape

    def take(self, other: PackedMasks) -> None:
        """Add the masks of another collection without unpacking them."""
        self.data |= other.data

    def set_packed(
        self, name: str, bits: Tensor | Callable[[], Tensor], shape: Sequence[int]
    ) -> None:
        """Set a mask that is packed already.

        Args:
            name: of the mask.
            bits: as `packed_mask` gives them, or a function that reads them each time that the mask
                is asked for.
            shape: of the mask.
        """
        self.data[name] = bits, torch.Size(shape)
