"""N:M sparse weights as kept values and their places: the same numbers in little more than N / M of the bytes.

Each group of M consecutive entries of a row stores N values and, for each, its place in the group in ceil(log2 M) bits, lowest
bit first, rows padded to whole bytes. Places ascend inside a group. 2:4 in bfloat16 takes 36 bits instead of 64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from permllm.errors import DataError
from permllm.sparsity import NMPattern, check_divides

# Places of 8 bits at most.
LARGEST_M = 256


def bits_of(pattern: NMPattern) -> int:
    """Bits of a place in a group of M."""
    return max(1, math.ceil(math.log2(pattern.m)))


def packed_shapes(rows: int, channels: int, pattern: NMPattern) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the values and of the packed places of a weight `(rows, channels)`."""
    kept = channels // pattern.m * pattern.n
    return (rows, kept), (rows, math.ceil(kept * bits_of(pattern) / 8))


def pack(weight: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """Pack a weight that is N:M in stored order.

    Args:
        weight: `(C_out, C_in)`, at most N nonzeros in each group of M along a row.
        pattern: N:M.

    Returns:
        The values `(C_out, C_in / M * N)` in the weight's dtype, and the places, uint8 (see `packed_shapes`).

    Raises:
        DataError: a group has more than N nonzeros, or more than 256 weights.
    """
    check_divides(pattern, weight.shape[1], "the layer")
    if pattern.m > LARGEST_M:
        raise DataError(f"{pattern} cannot be packed: a place in a group has at most 8 bits, which is {LARGEST_M} weights")
    parts = [_pack_rows(rows, pattern) for rows in weight.split(_rows_at_a_time(weight.shape[1]))]
    return torch.cat([values for values, _ in parts]), torch.cat([places for _, places in parts])


def _rows_at_a_time(channels: int) -> int:
    # Indices take eight bytes each: of a whole layer, several times its weight.
    return max(1, (1 << 18) // channels)


def _pack_rows(weight: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, pattern.m))
    nonzero = groups != 0
    if int((nonzero.sum(-1) > pattern.n).sum()):
        raise DataError(f"the weight is not {pattern} in stored order")
    # Nonzeros first, then zeros, each in their order; then the first N by place.
    places = (~nonzero).to(torch.uint8).argsort(dim=-1, stable=True)[..., : pattern.n].sort(dim=-1).values
    values = groups.gather(-1, places).flatten(1)
    return values, _pack_places(places.flatten(1).to(torch.uint8), bits_of(pattern))


def unpack(values: Tensor, packed: Tensor, pattern: NMPattern) -> Tensor:
    """The weight that `pack` was given, `(C_out, C_in)`, zeros as +0.0.

    Raises:
        DataError: the places are not those of a packed weight.
    """
    shape = tuple(values.shape)
    valid = len(shape) == 2 and shape[1] > 0 and shape[1] % pattern.n == 0 and values.is_floating_point()
    if not valid or packed.dtype != torch.uint8 or packed.shape != (shape[0], math.ceil(shape[1] * bits_of(pattern) / 8)):
        raise DataError(
            f"values {shape} in {values.dtype} and places {tuple(packed.shape)} in {packed.dtype} are no {pattern} weight"
        )
    rows = _rows_at_a_time(values.shape[1] // pattern.n * pattern.m)
    parts = zip(values.split(rows), packed.split(rows), strict=True)
    return torch.cat([_unpack_rows(part, places, pattern) for part, places in parts])


def _unpack_rows(values: Tensor, packed: Tensor, pattern: NMPattern) -> Tensor:
    places = _unpack_places(packed, bits_of(pattern), values.shape[1]).unflatten(1, (-1, pattern.n)).long()
    if int(places.max()) >= pattern.m or bool((places.diff(dim=-1) <= 0).any()):
        raise DataError(f"the places of its values are not those of a {pattern} weight")
    groups = values.new_zeros(*places.shape[:2], pattern.m)
    return groups.scatter_(-1, places, values.view_as(places)).flatten(1)


def _pack_places(places: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(bits, dtype=torch.uint8, device=places.device)
    spread = ((places.unsqueeze(-1) >> shifts) & 1).flatten(1)
    spread = torch.nn.functional.pad(spread, (0, -spread.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=places.device)
    return (spread * weights).sum(-1, dtype=torch.uint8)


def _unpack_places(packed: Tensor, bits: int, count: int) -> Tensor:
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    spread = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : count * bits].unflatten(1, (count, bits))
    weights = torch.tensor([1 << bit for bit in range(bits)], dtype=torch.uint8, device=packed.device)
    return (spread * weights).sum(-1, dtype=torch.uint8)
