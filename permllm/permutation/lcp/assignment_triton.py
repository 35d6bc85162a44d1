"""Linear sum assignments of many blocks at once on a GPU, with one Triton program for a block.

The method is shortest augmenting paths with dual variables (Jonker and Volgenant, Computing 38,
1987) in float64; its results are exact. It starts with the largest entry of every column. If these
entries form a permutation, as in most blocks at low temperatures, they are the result.
"""

# Triton has Python's syntax, and other types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor


def assign(soft: Tensor) -> Tensor:
    """Return the permutation of each block that maximises `<P, soft>`, int64 `(blocks, B)`.

    Args:
        soft: as in `harden`, on a GPU. With entries that are not finite, the result is arbitrary.
    """
    soft = soft.contiguous()
    count, size, _ = soft.shape
    permutations = torch.empty(count, size, dtype=torch.int64, device=soft.device)
    lanes = triton.next_power_of_2(size)
    with torch.cuda.device_of(soft):  # Triton launches on the current device
        _assign[(count,)](soft, permutations, size, lanes, num_warps=max(1, min(8, lanes // 64)))
    return permutations


@triton.jit
def _start(soft, size, LANES: tl.constexpr):
    """Return the least cost of each column, and its row, or -1 if another column has that row.

    Costs are the negative entries.
    """
    column = tl.arange(0, LANES)
    inside = column < size
    largest = tl.full((LANES,), float("-inf"), tl.float64)
    best = tl.full((LANES,), 0, tl.int32)
    for row in range(size):
        entries = tl.load(soft + row * size + column, mask=inside, other=0.0).to(tl.float64)
        better = entries > largest
        largest = tl.where(better, entries, largest)
        best = tl.where(better, row, best)
    has = tl.full((LANES,), -1, tl.int32)
    for row in range(size):
        first = tl.min(tl.where((best == row) & inside, column, LANES))
        has = tl.where(column == first, row, has)
    return tl.where(inside, -largest, 0.0), has


@triton.jit
def _assign(soft, permutations, size, LANES: tl.constexpr):
    """Solve one block; `of_row` has the dual variable of a row at the column that has the row."""
    block = tl.program_id(0).to(tl.int64)
    soft += block * size * size
    column = tl.arange(0, LANES)
    inside = column < size
    none = tl.full((), -1, tl.int32)
    of_column, has = _start(soft, size, LANES)
    of_row = tl.zeros((LANES,), tl.float64)
    for row in range(size):
        if tl.sum((has == row).to(tl.int32)) == 0:
            # Dijkstra's search from a row without a column to the nearest column without a row. It
            # takes at most `size` steps; the limit is for entries that are not finite.
            reached = tl.zeros((LANES,), tl.int32)
            distance = tl.full((LANES,), float("inf"), tl.float64)
            before = tl.full((LANES,), -1, tl.int32)
            of_start = tl.zeros((), tl.float64)
            at = none
            at_row = row + none + 1
            at_dual = of_start
            steps = none + 1
            while (at_row >= 0) & (steps < size):
                entries = tl.load(soft + at_row * size + column, mask=inside, other=0.0)
                candidate = -entries.to(tl.float64) - at_dual - of_column
                nearer = (reached == 0) & (candidate < distance)
                distance = tl.where(nearer, candidate, distance)
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
            # Each column on the path takes the row of the column before it.
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
    tl.store(permutations + block * size + column, has.to(tl.int64), mask=inside)
