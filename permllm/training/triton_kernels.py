"""Two Triton kernels of a masked linear on a GPU: masks with thresholds, and swap gradients.

Saliencies are made in float32 and ranked by comparisons in registers. The lowest channel wins a
tie.
"""

# Triton has Python's syntax, and other types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from permllm.training.elementwise import ChannelChunk, with_own

# Weights in a program of `_mask`, which one warp holds in registers.
_TILE = 1024
# Channels, groups and rows in a program of `_swap`: 64 elements a thread, and their sums.
_CHANNELS = 16
_GROUPS = 16
_ROWS = 32
_WARPS = 4


def mask(out: Tensor, chunk: ChannelChunk) -> Tensor:
    """Do as `permllm.training.kernels.Kernels.mask`, and return `out`."""
    # `out` replaces pointers that the kernel does not read.
    _launch_mask(out, chunk, grad=out, thresholds=out, stay=out, store_thresholds=False)
    return out


def swap_gradient(out: Tensor, chunk: ChannelChunk, grad: Tensor, size: int) -> Tensor:
    """Do as `permllm.training.kernels.Kernels.swap_gradient`; the result is float32."""
    channels = chunk.factors.column.shape[1]
    rows = chunk.weight_t.shape[1]
    groups = size // chunk.m
    blocks = channels // size
    empty = partial(torch.empty, dtype=torch.float32, device=out.device)
    thresholds = empty(4, channels // chunk.m, rows)
    stay = empty(channels, triton.cdiv(rows, _rows_of(chunk.m)))
    grad = grad.contiguous()
    _launch_mask(out, chunk, grad, thresholds, stay, store_thresholds=True)
    changes = empty(blocks, size, groups)
    grid = (blocks, triton.cdiv(size, _CHANNELS), triton.cdiv(groups, _GROUPS))
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _swap[grid](
            *_pointers(chunk), grad, thresholds, changes, rows, channels, size, groups,
            chunk.n / chunk.m, **_saliency_kind(chunk),
            CHANNELS=_CHANNELS, GROUPS=_GROUPS, ROWS=_ROWS, num_warps=_WARPS,
        )  # fmt: skip
    return with_own(changes, stay.sum(1), chunk.m)


def _launch_mask(
    out: Tensor,
    chunk: ChannelChunk,
    grad: Tensor,
    thresholds: Tensor,
    stay: Tensor,
    store_thresholds: bool,
) -> None:
    channels = chunk.factors.column.shape[1]
    rows = chunk.weight_t.shape[1]
    m = chunk.m
    grid = (channels // m, triton.cdiv(rows, _rows_of(m)))
    with torch.cuda.device_of(out):
        _mask[grid](
            *_pointers(chunk), grad, thresholds, stay, out, rows, channels, **_saliency_kind(chunk),
            N=chunk.n, M=m, LANES=triton.next_power_of_2(m), ROWS=_rows_of(m),
            THRESHOLDS=store_thresholds, num_warps=1,
        )  # fmt: skip


def _rows_of(m: int) -> int:
    """Return the number of output rows in a program of `_mask`."""
    return max(32, _TILE // triton.next_power_of_2(m))


def _pointers(chunk: ChannelChunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight, channels, and the factors of channels and of rows.

    Another tensor replaces a missing one; the kernel does not read it.
    """
    factors = chunk.factors
    column = factors.column.t() if factors.dense else factors.column
    channels = column if chunk.channels is None else chunk.channels
    row = column if factors.row is None else factors.row.contiguous()
    return chunk.weight_t.contiguous(), channels, column.contiguous(), row


def _saliency_kind(chunk: ChannelChunk) -> dict[str, Any]:
    factors = chunk.factors
    return {
        "GATHER": chunk.channels is not None,
        "POWER": factors.power,
        "TERMS": 0 if factors.row is None else len(factors.row),
        "DENSE": factors.dense,
    }


@triton.jit
def _saliency(
    w, column, row, at, x, valid, rows, channels,
    POWER: tl.constexpr, TERMS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Return the saliency of weights `w (positions, rows)` at positions `at` and rows `x`."""
    factor = tl.abs(w)
    if POWER == 2:
        factor = factor * factor
    if DENSE:
        score = tl.load(column + at[:, None] * rows + x[None, :], mask=valid, other=0.0)
    elif TERMS == 0:
        score = tl.load(column + at, mask=at < channels, other=0.0)[:, None]
    else:
        score = tl.zeros_like(w)
        for term in tl.static_range(TERMS):
            of_channel = tl.load(column + term * channels + at, mask=at < channels, other=0.0)
            of_row = tl.load(row + term * rows + x, mask=x < rows, other=0.0)
            score += of_channel[:, None] * of_row[None, :]
    return score if POWER == 0 else factor * score


@triton.jit
def _mask(
    weight, source, column, row, grad, thresholds, stay, out, rows, channels,
    GATHER: tl.constexpr, POWER: tl.constexpr, TERMS: tl.constexpr, DENSE: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Mask one group of M channels in a tile of output rows; with THRESHOLDS, store them too."""
    group = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    x = tile * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    member = lane < M
    at = group * M + lane
    valid = member[:, None] & (x < rows)[None, :]
    channel = tl.load(source + at, mask=member, other=0) if GATHER else at
    place = channel[:, None] * rows + x[None, :]
    stored = tl.load(weight + place, mask=valid, other=0.0)
    w = stored.to(tl.float32)
    s = _saliency(w, column, row, at, x, valid, rows, channels, POWER, TERMS, DENSE)
    s = tl.where(member[:, None], s, float("-inf"))
    rank = tl.zeros((LANES, ROWS), tl.int32)
    for other in tl.static_range(M):
        other_s = tl.sum(tl.where(lane[:, None] == other, s, 0.0), 0)[None, :]
        rank += ((other_s > s) | ((other_s == s) & (lane[:, None] > other))).to(tl.int32)
    keep = rank < N
    tl.store(out + place, tl.where(keep, stored, 0.0).to(out.dtype.element_ty), mask=valid)
    if THRESHOLDS:
        d = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32) * w
        next_d = tl.sum(tl.where(rank == N, d, 0.0), 0)
        size = (channels // M).to(tl.int64) * rows
        limit = thresholds + group * rows + x
        tl.store(limit, tl.sum(tl.where(rank == N - 1, s, 0.0), 0), mask=x < rows)
        tl.store(limit + size, tl.sum(tl.where(rank == N, s, 0.0), 0), mask=x < rows)
        tl.store(limit + 2 * size, tl.sum(tl.where(rank == N - 1, d, 0.0), 0), mask=x < rows)
        tl.store(limit + 3 * size, next_d, mask=x < rows)
        staying = tl.where(keep & valid, d - next_d[None, :], 0.0)
        tl.store(stay + at * tl.num_programs(1) + tile, tl.sum(staying, 1), mask=member)


@triton.jit
def _swap(
    weight, source, column, row, grad, thresholds, changes, rows, channels, size, groups, share,
    GATHER: tl.constexpr, POWER: tl.constexpr, TERMS: tl.constexpr, DENSE: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the changes for a tile of a block's channels and a tile of its groups."""
    block = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.program_id(2) * GROUPS + tl.arange(0, GROUPS)
    at = block * size + c
    channel = tl.load(source + at, mask=c < size, other=0) if GATHER else at
    every = (channels // size).to(tl.int64) * groups * rows
    total = tl.zeros((CHANNELS, GROUPS, ROWS), tl.float32)
    for first in range(0, rows, ROWS):
        x = first + tl.arange(0, ROWS)
        valid = (c < size)[:, None] & (x < rows)[None, :]
        place = channel[:, None] * rows + x[None, :]
        w = tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
        d = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32) * w
        s = _saliency(w, column, row, at, x, valid, rows, channels, POWER, TERMS, DENSE)[:, None, :]
        of_group = (g < groups)[:, None] & (x < rows)[None, :]
        limit = thresholds + (block * groups + g)[:, None] * rows + x[None, :]
        last = tl.load(limit, mask=of_group, other=float("inf"))[None, :, :]
        next_ = tl.load(limit + every, mask=of_group, other=float("inf"))[None, :, :]
        last_d = (tl.load(limit + 2 * every, mask=of_group, other=0.0) * (1.0 - share))[None, :, :]
        next_d = (tl.load(limit + 3 * every, mask=of_group, other=0.0) * share)[None, :, :]
        total = tl.where(s > last, total + ((d * (1.0 - share))[:, None, :] - last_d), total)
        total = tl.where(s > next_, total + ((d * share)[:, None, :] - next_d), total)
    inside = (c < size)[:, None] & (g < groups)[None, :]
    tl.store(changes + at[:, None] * groups + g[None, :], tl.sum(total, 2), mask=inside)
