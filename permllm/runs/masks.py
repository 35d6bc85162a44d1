"""Masks with one bit an entry, and checks of permutations and masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permllm.config import NMPattern


def is_permutation(order: Tensor) -> bool:
    """Return whether a tensor `(C_in,)` of whole numbers holds each number from 0 on once."""
    if order.dim() != 1 or order.is_floating_point():
        return False
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))


def violations(weight: Tensor, perm: Tensor | None, pattern: NMPattern) -> int:
    """Return the number of groups of M, in permuted order, that hold more than N nonzeros.

    Args:
        weight: `(C_out, C_in)`, original channel order.
        perm: int64 `(C_in,)`; None leaves the channels as they are.
    """
    kept = weight != 0
    groups = (kept if perm is None else kept[:, perm]).unflatten(-1, (-1, pattern.m))
    counts = torch.zeros(groups.shape[:-1], dtype=torch.int16, device=weight.device)  # as a sum it would take 8 bytes each
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


class PackedMasks(MutableMapping[str, Tensor]):
    """Masks by name that take one bit an entry, or none where they lie in a file; each is unpacked when it is asked for.

    A mask that was returned is a copy: set it again to change it.

    Args:
        masks: bool on the CPU, of any shape, by name.
    """

    def __init__(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        self._bits: dict[str, Tensor | Callable[[], Tensor]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self.update(masks)

    def __getitem__(self, name: str) -> Tensor:
        return unpacked_mask(*self.packed(name))

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self.set_packed(name, packed_mask(mask), mask.shape)

    def __delitem__(self, name: str) -> None:
        del self._bits[name], self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __getstate__(self) -> dict[str, Any]:
        return {"_bits": {name: self.packed(name)[0] for name in self}, "_shapes": self._shapes}  # no files of another process

    def packed(self, name: str) -> tuple[Tensor, torch.Size]:
        """Return a mask as `packed_mask` gives it, and its shape."""
        bits = self._bits[name]
        return bits if isinstance(bits, Tensor) else bits(), self._shapes[name]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a mask, `(C_out, C_in)` for a linear."""
        return self._shapes[name]

    def take(self, other: PackedMasks, names: Iterable[str]) -> None:
        """Add masks of another collection without unpacking them."""
        for name in names:
            self.set_packed(name, other._bits[name], other._shapes[name])

    def set_packed(self, name: str, bits: Tensor | Callable[[], Tensor], shape: Sequence[int]) -> None:
        """Set a mask that is packed already.

        Args:
            name: of the mask.
            bits: as `packed_mask` gives them, or a function that reads them each time that the mask is asked for.
            shape: of the mask.
        """
        self._bits[name], self._shapes[name] = bits, torch.Size(shape)
