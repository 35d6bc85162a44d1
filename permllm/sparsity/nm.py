"""Pure mathematics of N:M masks.

A mask is bool, True = kept. Groups are M consecutive entries along one dimension; each keeps its N
largest entries. The lowest index wins a tie, so that a mask depends on the saliency alone. Ties are
common in 4-bit weights: in 15 % of the groups of four, the second and third magnitudes are equal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from permllm.settings.config import NMPattern

# Pairwise comparisons take M (M - 1) / 2 vectorised operations. A stable sort is faster for a
# larger M.
COMPARE_UP_TO = 16


def keep_largest(values: Tensor, n: int, dim: int) -> Tensor:
    """Return the mask, bool, of the `n` largest values along `dim`."""
    return torch.stack(keep_largest_of(values.unbind(dim), n), dim=dim)


def keep_largest_of(entries: Sequence[Tensor], n: int) -> list[Tensor]:
    """Return M bool tensors that mark the `n` largest of M entries, place by place."""
    return [rank < n for rank in ranks_of(entries)]


def ranks_of(entries: Sequence[Tensor]) -> list[Tensor]:
    """Return the ranks of M entries of one shape, place by place, as integers from 0, the largest.

    The lowest index wins a tie.
    """
    m = len(entries)
    if m > COMPARE_UP_TO:
        order = torch.stack(list(entries)).argsort(dim=0, descending=True, stable=True)
        return list(order.argsort(0))
    # Eager code is fastest with bytes. Compiled code cannot vectorise bytes, but keeps counts in
    # registers.
    counter = torch.int32 if torch.compiler.is_compiling() else torch.int8
    # ahead[i] counts the entries that are larger than entry i, or equal with a lower index. In each
    # pair i < j exactly one entry is ahead. At the start every j counts as ahead of i.
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
    """Return the N:M mask, bool, of a saliency `(..., C_in)` along the last dimension."""
    groups = saliency.unflatten(-1, (-1, pattern.m))
    return keep_largest(groups, pattern.n, dim=-1).flatten(-2)


def permuted_nm_mask(saliency: Tensor, permutation: Tensor, pattern: NMPattern) -> Tensor:
    """Return the N:M mask of permuted channels, bool `(C_out, C_in)` in original order.

    `saliency (C_out, C_in)` is in original order, and `saliency[:, permutation]` is permuted.
    """
    return nm_mask(saliency[:, permutation], pattern)[:, permutation.argsort()]


def violations(weight: Tensor, permutation: Tensor | None, pattern: NMPattern) -> int:
    """Return the number of groups of M permuted weights that have more than N nonzeros.

    `weight (C_out, C_in)` is in original order; a permutation of None is the identity.
    """
    return int((_kept_in_groups(weight != 0, permutation, pattern) > pattern.n).sum())


def is_nm_mask(mask: Tensor, permutation: Tensor, pattern: NMPattern) -> bool:
    """Tell if a mask in original order keeps exactly N of every M permuted channels."""
    return bool((_kept_in_groups(mask, permutation, pattern) == pattern.n).all())


def _kept_in_groups(mask: Tensor, permutation: Tensor | None, pattern: NMPattern) -> Tensor:
    """Return how many entries of each group of M are kept, int16 `(C_out, C_in / M)`."""
    permuted = mask if permutation is None else mask[:, permutation]
    groups = permuted.unflatten(-1, (-1, pattern.m))
    # `groups.sum(-1)` would need int64, four times the memory.
    counts = torch.zeros(groups.shape[:-1], dtype=torch.int16, device=mask.device)
    for entries in groups.unbind(-1):
        counts += entries
    return counts


def saliency_sum(saliency: Tensor, mask: Tensor | None = None) -> float:
    """Return the sum of a saliency, or of its kept entries, in float64; None: all entries."""
    entries = saliency if mask is None else torch.where(mask, saliency, 0.0)
    return float(entries.sum(dtype=torch.float64))
