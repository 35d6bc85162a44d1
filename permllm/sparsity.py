"""Pure mathematics of N:M masks.

A mask is bool, True = kept. Groups are M consecutive entries along one dimension; each keeps its N largest entries. Equal
entries are ordered by position, the lowest index first, so that a mask is a function of the saliency alone: 4-bit weights
tie often (in 15 % of the groups of four, the second and third magnitudes are equal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor

from permllm.config import NMPattern, check_divides

__all__ = [
    "NMPattern",
    "PackedMasks",
    "check_divides",
    "is_permutation",
    "keep_largest",
    "keep_largest_of",
    "nm_mask",
    "packed_mask",
    "permuted_nm_mask",
    "ranks_of",
    "retained_saliency",
    "saliency_sum",
    "unpacked_mask",
    "violations",
]

# Pairwise comparisons cost M (M - 1) / 2 vectorised passes. Past this M a stable sort is cheaper.
_COMPARE_UP_TO = 16


def keep_largest(values: Tensor, n: int, dim: int) -> Tensor:
    """Mask of the `n` largest entries along `dim`, ties to the lowest index.

    Args:
        values: any shape, floating; `dim` is one group of M entries.
        n: how many to keep, 0 < n < values.shape[dim].

    Returns:
        bool, the shape of `values`, with exactly `n` True along `dim`.
    """
    m = values.shape[dim]
    if m > _COMPARE_UP_TO:
        order = values.argsort(dim=dim, descending=True, stable=True)
        return torch.zeros_like(values, dtype=torch.bool).scatter_(dim, order.narrow(dim, 0, n), True)
    return torch.stack(keep_largest_of(values.unbind(dim), n), dim=dim)


def keep_largest_of(entries: Sequence[Tensor], n: int) -> list[Tensor]:
    """Which of M tensors hold the `n` largest entries, place by place, ties to the first.

    Args:
        entries: M tensors of one shape.
        n: how many to keep at each place, 0 < n < M.

    Returns:
        M bool tensors of that shape.
    """
    return [rank < n for rank in ranks_of(entries)]


def ranks_of(entries: Sequence[Tensor]) -> list[Tensor]:
    """How many of M tensors hold a larger entry, place by place; of equal ones the first counts as the larger.

    Args:
        entries: M tensors of one shape.

    Returns:
        M integer tensors of that shape, at each place a permutation of 0 to M - 1.
    """
    m = len(entries)
    # Bytes are fastest as they stand; compiled code cannot vectorise them, but keeps counts in registers.
    counter = torch.int32 if torch.compiler.is_compiling() else torch.int8 if m <= 128 else torch.int16
    # ahead[i] counts the entries that come before entry i in the order "larger first, then lower index". Of each pair
    # i < j exactly one is ahead of the other: start as if every j were ahead of i, then correct.
    ahead = [torch.full(entries[0].shape, m - 1 - i, dtype=counter, device=entries[0].device) for i in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            i_first = (entries[i] >= entries[j]).to(counter)
            ahead[j] += i_first
            ahead[i] -= i_first
    return ahead


def nm_mask(saliency: Tensor, pattern: NMPattern) -> Tensor:
    """N:M mask along the last dimension.

    Args:
        saliency: `(..., C_in)`, floating, larger is more worth keeping; M divides C_in.

    Returns:
        bool `(..., C_in)`, exactly N True in each group of M consecutive entries.

    Raises:
        ConfigError: M does not divide C_in.
    """
    channels = saliency.shape[-1]
    check_divides(pattern, channels, "the layer")
    groups = saliency.unflatten(-1, (channels // pattern.m, pattern.m))
    return keep_largest(groups, pattern.n, dim=-1).flatten(-2)


def permuted_nm_mask(saliency: Tensor, perm: Tensor, pattern: NMPattern) -> Tensor:
    """N:M mask that is chosen in permuted order and returned in the original order.

    Args:
        saliency: `(C_out, C_in)`, original channel order.
        perm: int64 `(C_in,)`, `saliency[:, perm]` is the permuted order.

    Returns:
        bool `(C_out, C_in)`, original channel order.
    """
    return nm_mask(saliency[:, perm], pattern)[:, perm.argsort()]


def is_permutation(order: Tensor) -> bool:
    """Whether a tensor holds each whole number from 0 on once: `(C_in,)`, in any format of whole numbers."""
    if order.dim() != 1 or order.is_floating_point():
        return False
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))


def violations(weight: Tensor, perm: Tensor | None, pattern: NMPattern) -> int:
    """Number of groups of M, in permuted order, that hold more than N nonzeros.

    Args:
        weight: `(C_out, C_in)`, original channel order.
        perm: int64 `(C_in,)`; None leaves the channels as they are.
    """
    kept = weight != 0
    groups = (kept if perm is None else kept[:, perm]).unflatten(-1, (-1, pattern.m))
    if pattern.m > _COMPARE_UP_TO:
        return int((groups.sum(-1, dtype=torch.int32) > pattern.n).sum())
    counts = torch.zeros(groups.shape[:-1], dtype=torch.int8, device=weight.device)  # as a sum it would take 8 bytes each
    for entries in groups.unbind(-1):
        counts += entries
    return int((counts > pattern.n).sum())


def retained_saliency(saliency: Tensor, mask: Tensor) -> float:
    """Share of the total saliency that the mask keeps, in [0, 1] (RIA's objective for a permutation)."""
    return saliency_sum(saliency, mask) / max(saliency_sum(saliency), 1e-300)


def saliency_sum(saliency: Tensor, mask: Tensor | None = None) -> float:
    """Sum of a saliency, or of what a mask keeps of it, in float64."""
    kept = saliency if mask is None else torch.where(mask, saliency, 0.0)
    return float(kept.sum(dtype=torch.float64))


def packed_mask(mask: Tensor) -> Tensor:
    """A mask of any shape on the CPU with one bit an entry: uint8 `(bytes,)`, row by row, the first in the highest bit."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def unpacked_mask(bits: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """What `packed_mask` has packed, bool.

    Args:
        bits: uint8 `(bytes,)` on the CPU.
        shape: of the mask; None leaves the entries in one row, to the end of the last byte.
    """
    count = None if shape is None else math.prod(shape)
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool))
    return mask if shape is None else mask.view(*shape)


class PackedMasks(MutableMapping[str, Tensor]):
    """Masks by name that take one bit an entry while they wait, or none; each is unpacked anew when it is asked for.

    Changing what was unpacked changes nothing here: a mask is set again for that.

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

    def packed(self, name: str) -> tuple[Tensor, torch.Size]:
        """A mask as `packed_mask` gives it, and its shape."""
        bits = self._bits[name]
        return bits if isinstance(bits, Tensor) else bits(), self._shapes[name]

    def shape(self, name: str) -> torch.Size:
        """Of a mask, `(C_out, C_in)` of a linear's."""
        return self._shapes[name]

    def take(self, other: PackedMasks, names: Iterable[str]) -> None:
        """Have masks of others, as they are packed there, or wherever they are read from."""
        for name in names:
            self.set_packed(name, other._bits[name], other._shapes[name])

    def set_packed(self, name: str, bits: Tensor | Callable[[], Tensor], shape: Sequence[int]) -> None:
        """Have a mask that is packed already.

        Args:
            name: of the mask.
            bits: as `packed_mask` gives them; or what reads them, each time that the mask is asked for.
            shape: of the mask.
        """
        self._bits[name], self._shapes[name] = bits, torch.Size(shape)
