"""Blocks of channels in which a permutation moves them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockStack:
    """Stack of `count` blocks of `size` consecutive positions, from position `start` on."""

    start: int
    count: int
    size: int


def split_blocks(channels: int, block_size: int, segment: int | None = None) -> list[BlockStack]:
    """Split positions into blocks; the remainder of each segment becomes one smaller block.

    If M divides all three numbers, M also divides the smaller block, so that no group of M crosses
    a block.

    Args:
        channels: C, the number of positions.
        block_size: B.
        segment: no block crosses a multiple of this number, which divides C; None: C.
    """
    segment = segment or channels
    block_size = min(block_size, segment)
    count, rest = divmod(segment, block_size)
    if not rest:
        return [BlockStack(0, channels // block_size, block_size)]
    stacks = []
    for start in range(0, channels, segment):
        stacks.append(BlockStack(start, count, block_size))
        stacks.append(BlockStack(start + count * block_size, 1, rest))
    return stacks
