"""Elementwise work of a masked linear on a chunk of its channels.

The functions here make the saliency, the N:M mask, and the parts of a permutation's gradient. They
hold the M places of all groups as M tensors and join these at the end, so that a compiler makes one
pass over memory.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from permllm.sparsity.nm import keep_largest_of, ranks_of
from permllm.sparsity.saliency import SaliencyFactors, saliency_t


class ChannelChunk(NamedTuple):
    """Channels of a linear with their saliency factors: whole groups of M, permuted.

    Attributes:
        weight_t: `(C_in, C_out)`, a channel in a row.
        channels: int64 `(k,)`, the channels of the chunk; None: all channels of `weight_t`.
        factors: saliency factors of these k channels.
        n, m: the pattern N:M.
    """

    weight_t: Tensor
    channels: Tensor | None
    factors: SaliencyFactors
    n: int
    m: int

    def of(self, values: Tensor) -> Tensor:
        """Return the rows of the chunk, `(k, C_out)`, in a tensor shaped like `weight_t`."""
        return values if self.channels is None else values.index_select(0, self.channels)


def masked_chunk(chunk: ChannelChunk, dtype: torch.dtype) -> Tensor:
    """Return the chunk times its N:M mask, `(k, C_out)`."""
    w = _places(chunk.of(chunk.weight_t), chunk.m)
    return _masked(w, keep_largest_of(_saliencies(w, chunk), chunk.n), dtype)


def softmax_gradients(
    chunk: ChannelChunk, grad: Tensor, dtype: torch.dtype, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the parts of the gradient of `straight_through=hard` or `soft` (LCP's linear).

    Args:
        chunk: chunk of the weight.
        grad: gradient of the masked `weight_t`, `(C_in, C_out)`.
        dtype: dtype of the results.
        hard: True returns the hard mask; False returns the softmax of each group.

    Returns:
        Five `(k, C_out)`: the masked chunk, its saliency, the gradients of saliency and mask, and
        the mask (hard or soft).
    """
    w = _places(chunk.of(chunk.weight_t), chunk.m)
    s = _saliencies(w, chunk)
    keep = keep_largest_of(s, chunk.n)
    grad_mask = _mask_gradients(w, s, chunk, grad)
    largest = reduce(torch.maximum, s)
    exponentials = [(part - largest).exp() for part in s]
    total = reduce(torch.add, exponentials)
    soft_mask = [part / total for part in exponentials]
    products = [of_mask * soft for of_mask, soft in zip(grad_mask, soft_mask, strict=True)]
    mean = reduce(torch.add, products)
    grad_s = [product - soft * mean for product, soft in zip(products, soft_mask, strict=True)]
    return (
        _masked(w, keep, dtype),
        _join(s, dtype),
        _join(grad_s, dtype),
        _join(grad_mask, dtype),
        _join(keep if hard else soft_mask, dtype),
    )


def swap_thresholds(
    chunk: ChannelChunk, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the entries of each group that decide how swaps change the loss.

    Args:
        chunk, grad: as in `softmax_gradients`; k channels in g = k / M groups.
        dtype: dtype of the first result.

    Returns:
        The chunk times its mask, its saliency, and the gradient of all mask entries, `(k, C_out)`
        each. Then four tensors `(g, C_out)`: the saliency of the smallest kept and of the largest
        pruned entry, and the gradients of these two mask entries. At last `(k,)`, the change of the
        loss if a channel stays in its group, relative to its removal.
    """
    n = chunk.n
    w = _places(chunk.of(chunk.weight_t), chunk.m)
    s = _saliencies(w, chunk)
    ranks = ranks_of(s)
    d = _mask_gradients(w, s, chunk, grad)

    def at(position: int, places: list[Tensor]) -> Tensor:
        picked = [
            torch.where(rank == position, part, 0.0)
            for rank, part in zip(ranks, places, strict=True)
        ]
        return reduce(torch.add, picked)

    next_d = at(n, d)
    stay = [
        torch.where(rank < n, part - next_d, 0.0).sum(-1)
        for rank, part in zip(ranks, d, strict=True)
    ]
    return (
        _masked(w, [rank < n for rank in ranks], dtype),
        _join(s, s[0].dtype),
        _join(d, s[0].dtype),
        (at(n - 1, s), at(n, s), at(n - 1, d), next_d),
        torch.stack(stay, 1).flatten(),
    )


def swap_changes(
    s: Tensor, d: Tensor, groups: tuple[Tensor, Tensor, Tensor, Tensor], share: float
) -> Tensor:
    """Return the change of the loss, `(blocks, B, G)`, if a channel replaces a random member.

    Args:
        s, d: saliency of each channel, and gradient of its mask, `(blocks, B, C_out)`.
        groups: the four tensors of `swap_thresholds` for G groups of the same block, each
            `(blocks, G, C_out)`.
        share: N / M, the probability that the replaced entry was kept.
    """
    last, next_, last_d, next_d = (part.unsqueeze(1) for part in groups)
    s = s.unsqueeze(2)
    d = d.unsqueeze(2)
    change = torch.where(s > last, d - last_d, 0.0) * (1.0 - share)
    return (change + torch.where(s > next_, d - next_d, 0.0) * share).sum(-1)


def with_own(changes: Tensor, stay: Tensor, m: int) -> Tensor:
    """Write `stay (k,)` into `changes (blocks, B, B / M)`, at the own group of each channel."""
    blocks, _, groups = changes.shape
    own = changes.view(blocks, groups, m, groups).diagonal(dim1=1, dim2=3)  # (blocks, M, groups)
    own.copy_(stay.view(blocks, groups, m).mT)
    return changes


def _places(t: Tensor, m: int) -> list[Tensor]:
    return [t[place::m] for place in range(m)]


def _join(places: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([place.to(dtype) for place in places], 1).flatten(0, 1)


def _masked(w: list[Tensor], keep: list[Tensor], dtype: torch.dtype) -> Tensor:
    return _join([torch.where(mask, part, 0.0) for mask, part in zip(keep, w, strict=True)], dtype)


def _saliencies(w: list[Tensor], chunk: ChannelChunk) -> list[Tensor]:
    power = chunk.factors.power
    column = chunk.factors.column
    row = chunk.factors.row
    return [
        saliency_t(part, SaliencyFactors(power, column[:, place :: chunk.m], row))
        for place, part in enumerate(w)
    ]


def _mask_gradients(
    w: list[Tensor], s: list[Tensor], chunk: ChannelChunk, grad: Tensor
) -> list[Tensor]:
    places = _places(chunk.of(grad), chunk.m)
    return [part.to(s[0].dtype) * weight for part, weight in zip(places, w, strict=True)]
