"""Blocks of the positions of an order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockStack:
    """`count` blocks of `size` consecutive positions that begin at position `start`."""

    start: int
    count: int
    size: int


def split_blocks(channels: int, block_size: int, segment: int | None = None) -> list[BlockStack]:
    """Blocks of `block_size` positions; what is left at the end of each segment becomes one smaller block.

    With M dividing all three numbers, M also divides the smaller block, so no group of M crosses a
    block.

    Args:
        channels: C.
        block_size: B.
        segment: blocks begin anew at its multiples; it divides C. None is C.
    """
    segment = channels if segment is None else segment
    count, rest = divmod(segment, block_size)
    if segment < block_size:
        count, rest, block_size = 1, 0, segment
    if not rest:
        return [BlockStack(0, channels // block_size, block_size)]
    stacks = []
    for start in range(0, channels, segment):
        stacks += [
            BlockStack(start, count, block_size),
            BlockStack(start + count * block_size, 1, rest),
        ]
    return stacks


def count_logits(stacks: list[BlockStack]) -> int:
    """Number of logits: the sum of the squared block sizes."""
    return sum(stack.count * stack.size**2 for stack in stacks)
