"""The linear sum assignment of many blocks at once on a GPU: one Triton program a block.

Shortest augmenting paths with dual variables, as Jonker and Volgenant have it (Computing 38, 1987),
in float64: exact, whatever the numbers. It begins with the largest entry of every column; where
these are a permutation already, as at low temperatures in most blocks, nothing is left to do.
"""

# Triton's language is Python's syntax, not its types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def assign(soft: Tensor) -> Tensor:
    """The permutation of each block that maximises `<P, soft>`.

    Args:
        soft: `(blocks, B, B)` on a GPU; row = source channel, column = target position. What is not
            finite gives anything.

    Returns:
        int64 `(blocks, B)`, entry j of a block the source channel at position j.
    """
    soft = soft.contiguous()
    count, size, _ = soft.shape
    perms = torch.empty(count, size, dtype=torch.int64, device=soft.device)
    lanes = triton.next_power_of_2(size)
    if count:  # a rank may have no block
        with torch.cuda.device_of(
            soft
        ):  # Triton launches where the process is, not where its tensors are
            _assign[(count,)](soft, perms, size, lanes, num_warps=max(1, min(8, lanes // 64)))
    return perms


@triton.jit
def _assign(soft, perms, size, LANES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    soft += block * size * size
    column = tl.arange(0, LANES)
    inside = column < size
    none = tl.full((), -1, tl.int32)

    # Costs are the negative of what is maximised. Dual variables of columns: the least cost; of
    # rows: zero.
    largest = tl.full((LANES,), float("-inf"), tl.float64)
    best = tl.full((LANES,), 0, tl.int32)
    for row in range(size):
        entries = tl.load(soft + row * size + column, mask=inside, other=0.0).to(tl.float64)
        better = entries > largest
        largest = tl.where(better, entries, largest)
        best = tl.where(better, row, best)
    of_column = tl.where(inside, -largest, 0.0)
    # The row that a column has, and that row's dual variable: the first column that wants a row has
    # it.
    has = tl.full((LANES,), -1, tl.int32)
    of_row = tl.zeros((LANES,), tl.float64)
    for row in range(size):
        first = tl.min(tl.where((best == row) & inside, column, LANES))
        has = tl.where(column == first, row, has)

    for row in range(size):
        if tl.sum((has == row).to(tl.int32)) == 0:
            # Dijkstra from a row without a column to the nearest column without a row. `size` steps
            # are enough; what is not finite might take more.
            reached = tl.zeros((LANES,), tl.int32)
            distance = tl.full((LANES,), float("inf"), tl.float64)
            before = tl.full((LANES,), -1, tl.int32)
            of_start = tl.zeros((), tl.float64)
            at, at_row, at_dual = none, row + none + 1, of_start
            steps = none + 1
            while (at_row >= 0) & (steps < size):
                entries = tl.load(soft + at_row * size + column, mask=inside, other=0.0).to(
                    tl.float64
                )
                found = -entries - at_dual - of_column
                nearer = (reached == 0) & (found < distance)
                distance = tl.where(nearer, found, distance)
                before = tl.where(nearer, at, before)
                open_ = tl.where((reached == 0) & inside, distance, float("inf"))
                step = tl.min(open_)
                at = tl.argmin(open_, 0).to(tl.int32)
                of_start += step
                of_row = tl.where(reached == 1, of_row + step, of_row)
                of_column = tl.where(reached == 1, of_column - step, of_column)
                distance = tl.where(reached == 1, distance, distance - step)
                reached = tl.where(column == at, 1, reached)
                at_row = tl.sum(tl.where(column == at, has, 0))
                at_dual = tl.sum(tl.where(column == at, of_row, 0.0))
                steps += 1
            # Each column on the way takes the row of the one before it.
            back = none + 1
            while (at >= 0) & (back < size):
                earlier = tl.sum(tl.where(column == at, before, 0))
                earlier_row = tl.where(
                    earlier < 0, row, tl.sum(tl.where(column == earlier, has, 0))
                )
                earlier_dual = tl.where(
                    earlier < 0, of_start, tl.sum(tl.where(column == earlier, of_row, 0.0))
                )
                has = tl.where(column == at, earlier_row, has)
                of_row = tl.where(column == at, earlier_dual, of_row)
                at = earlier
                back += 1
    tl.store(perms + block * size + column, has.to(tl.int64), mask=inside)
