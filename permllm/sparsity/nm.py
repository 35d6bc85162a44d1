"""Pure mathematics of N:M masks.

A mask is bool, True = kept. Groups are M consecutive entries along one dimension; each keeps its N
largest entries. Equal entries are ordered by position, the lowest index first, so that a mask is a
function of the saliency alone: 4-bit weights tie often (in 15 % of the groups of four, the second
and third magnitudes are equal).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permllm.config import NMPattern

# Pairwise comparisons cost M (M - 1) / 2 vectorised passes. Past this M a stable sort is cheaper.
COMPARE_UP_TO = 16


def keep_largest(values: Tensor, n: int, dim: int) -> Tensor:
    """Return the mask, bool, of the `n` largest values along `dim`, ties to the lowest index."""
    return torch.stack(keep_largest_of(values.unbind(dim), n), dim=dim)


def keep_largest_of(entries: Sequence[Tensor], n: int) -> list[Tensor]:
    """Tell, as bool tensors, which of M tensors hold the `n` largest entries, place by place."""
    return [rank < n for rank in ranks_of(entries)]


def ranks_of(entries: Sequence[Tensor]) -> list[Tensor]:
    """Count how many of M tensors hold a larger entry, place by place; ties go to the first.

    Args:
        entries: M tensors of one shape.

    Returns:
        M integer tensors of that shape, at each place a permutation of 0 to M - 1.
    """
    m = len(entries)
    if m > COMPARE_UP_TO:
        order = torch.stack(list(entries)).argsort(dim=0, descending=True, stable=True)
        return list(order.argsort(0))
    # Bytes are fastest as they stand; compiled code cannot vectorise them, but keeps counts in
    # registers.
    counter = torch.int32 if torch.compiler.is_compiling() else torch.int8
    # ahead[i] counts the entries that come before entry i in the order "larger first, then lower
    # index". Of each pair i < j exactly one is ahead of the other: start as if every j were ahead
    # of i, then correct.
    ahead = [
        torch.full(entries[0].shape, m - 1 - i, dtype=counter, device=entries[0].device)
        for i in range(m)
    ]
    for i in range(m):
        for j in range(i + 1, m):
            i_first = (entries[i] >= entries[j]).to(counter)
            ahead[j] += i_first
            ahead[i] -= i_first
    return ahead


def nm_mask(saliency: Tensor, pattern: NMPattern) -> Tensor:
    """Return the N:M mask, bool, of a saliency `(..., C_in)` along its last dimension."""
    groups = saliency.unflatten(-1, (-1, pattern.m))
    return keep_largest(groups, pattern.n, dim=-1).flatten(-2)


def permuted_nm_mask(saliency: Tensor, perm: Tensor, pattern: NMPattern) -> Tensor:
    """Return the N:M mask of permuted channels in the original order, bool `(C_out, C_in)`.

    Args:
        saliency: `(C_out, C_in)`, original order.
        perm: int64 `(C_in,)`, `saliency[:, perm]` is the permuted order.
        pattern: N:M.
    """
    return nm_mask(saliency[:, perm], pattern)[:, perm.argsort()]


def saliency_sum(saliency: Tensor, mask: Tensor | None = None) -> float:
    """Sum a saliency, or what a mask keeps of it, in float64."""
    kept = saliency if mask is None else torch.where(mask, saliency, 0.0)
    return float(kept.sum(dtype=torch.float64))
