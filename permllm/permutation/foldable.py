"""Permutations that channel groups share, and permutations that fold into a model's weights.

Learning and searching work on *shared permutations*. A shared permutation is cut into segments that
no channel leaves. One or several channel groups take their permutations from it. With
`constraint=free` each group has a permutation of its own, with one segment. With
`constraint=foldable` the neighbouring weights can absorb the permutations:

- Linears produce the channels one by one (the inner width of an MLP): any permutation folds.
- Attention produces the channels: they are permuted inside each head, alike for all query heads of
  one key-value head.
- The residual stream: all groups in all layers that read it have the same permutation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.permutation.base import Constraint
from permllm.settings.config import NMPattern

RESIDUAL = "residual_stream"


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


@dataclass(frozen=True)
class SharedPermutation:
    """Shared permutation and the channel groups that use it.

    The channels of a group are the segments of the shared permutation, each `repeats` times in a
    row: the segments a and b with 2 repeats are a a b b. Every copy of a segment is permuted like
    the segment.

    Attributes:
        name: name of the group, or `residual_stream`.
        channels: length of the permutation.
        segment: length of a segment; no block and no channel crosses a multiple of it.
        repeats: number of copies of each segment in a group.
        groups: groups that use the permutation, as the model runs them.
    """

    name: str
    channels: int
    segment: int
    repeats: int
    groups: tuple[ChannelGroup, ...]

    @property
    def layers(self) -> range:
        """Return the decoder layers from the first group to the last."""
        return range(self.groups[0].layer, self.groups[-1].layer + 1)

    def stacks(self, block_size: int, repeats: int = 1) -> list[BlockStack]:
        """Return the blocks of the shared permutation; with `repeats`, the blocks of a group."""
        return split_blocks(self.channels * repeats, block_size, self.segment)

    def expand(self, permutation: Tensor) -> Tensor:
        """Return a group's permutation, int64 `(channels * repeats,)`, of `(channels,)`."""
        local = permutation.view(-1, 1, self.segment) - self._starts(1, permutation.device)
        return (local + self._starts(self.repeats, permutation.device)).flatten()

    def expand_rows(self, values: Tensor) -> Tensor:
        """Repeat values `(channels,)` of the segments to `(channels * repeats,)`."""
        return values.view(-1, 1, self.segment).expand(-1, self.repeats, -1).reshape(-1)

    def expand_blocks(self, stacks: list[Tensor]) -> list[Tensor]:
        """Repeat stacks of block matrices to the stacks of a group."""
        segments = self.channels // self.segment
        if len(stacks) == 1:
            blocks = stacks[0].unflatten(0, (segments, 1, -1))
            return [blocks.expand(-1, self.repeats, -1, -1, -1).flatten(0, 2)]
        each = len(stacks) // segments
        return [
            stack
            for first in range(0, len(stacks), each)
            for stack in stacks[first : first + each] * self.repeats
        ]

    def collect(self, saliency: Tensor) -> Tensor:
        """Gather a group's saliency, `(rows, channels * repeats)`, on the shared positions.

        The copies become further rows: `(rows * repeats, channels)`.
        """
        copies = saliency.unflatten(1, (-1, self.repeats, self.segment)).movedim(2, 0)
        return copies.reshape(-1, self.channels)

    def contract(self, permutation: Tensor) -> Tensor | None:
        """Return the shared permutation, int64 `(channels,)`, of an expanded one, or None."""
        copies = permutation.cpu().view(-1, self.repeats, self.segment)
        local = copies - self._starts(self.repeats, copies.device)
        inside = (local >= 0) & (local < self.segment)
        if not bool(inside.all()) or not bool((local == local[:, :1]).all()):
            return None
        return (local[:, :1] + self._starts(1, copies.device)).flatten()

    def _starts(self, repeats: int, device: torch.device) -> Tensor:
        """Return the first position of each copy of each segment, `(segments, repeats, 1)`."""
        starts = torch.arange(0, self.channels * repeats, self.segment, device=device)
        return starts.view(-1, repeats, 1)


def shared_permutations(
    groups: list[ChannelGroup], constraint: Constraint
) -> list[SharedPermutation]:
    """Return the shared permutations of a model, sorted as their first groups run.

    Raises:
        ConfigError: `constraint` is `foldable`, and nothing absorbs the permutation of a group.
    """
    stream = tuple(group for group in groups if not group.table.producers)
    shared = []
    for group in groups:
        if constraint == "free":
            shared.append(
                SharedPermutation(group.name, group.channels, group.channels, 1, (group,))
            )
        elif not group.table.folds:
            raise ConfigError(
                "permutation.constraint=foldable: no family table names weights that absorb the "
                f"permutation of {group.name}; expected permutation.constraint=free, with "
                "export=gathered"
            )
        elif group.table.producers:
            shared.append(produced_permutation(group))
        elif group is stream[0]:
            shared.append(SharedPermutation(RESIDUAL, group.channels, group.channels, 1, stream))
    return shared


def permutations_within(shared: list[SharedPermutation], layers: range) -> list[SharedPermutation]:
    """Return the permutations whose groups all lie in some layers."""
    return [
        permutation
        for permutation in shared
        if permutation.layers[0] in layers and permutation.layers[-1] in layers
    ]


def produced_permutation(group: ChannelGroup) -> SharedPermutation:
    """Return the shared permutation that the producers of a group absorb."""
    heads, repeats = group.heads
    channels = group.channels // repeats
    segment = channels // heads if group.table.by_head else channels
    return SharedPermutation(group.name, channels, segment, repeats, (group,))


def check_segments(shared: list[SharedPermutation], pattern: NMPattern) -> None:
    """Raise ConfigError if a group of M crosses a segment of a shared permutation."""
    for permutation in shared:
        if permutation.segment % pattern.m:
            raise ConfigError(
                f"permutation.constraint=foldable: the heads of {permutation.name} have "
                f"{permutation.segment} channels; expected a multiple of M = {pattern.m}, or "
                "permutation.constraint=free"
            )


def expanded(shared: list[SharedPermutation], permutations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the permutations of all groups, by name and in memory of their own.

    `permutations` are the values of the shared ones, by their names.
    """
    return {
        group.name: permutation.expand(permutations[permutation.name])
        for permutation in shared
        for group in permutation.groups
    }


def folded_permutations(
    groups: list[ChannelGroup], permutations: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the shared permutations, by name, that expand to the permutations of all groups.

    Raises:
        ConfigError: a permutation does not fold; the message names its group.
    """
    folded: dict[str, Tensor] = {}
    for group in groups:
        permutation = permutations[group.name]
        if not group.table.folds and not torch.equal(
            permutation.cpu(), torch.arange(len(permutation))
        ):
            raise _refusal(group, "its family has no table")
    for shared in shared_permutations([group for group in groups if group.table.folds], "foldable"):
        for group in shared.groups:
            value = shared.contract(permutations[group.name])
            if value is None:
                raise _refusal(group, "it is not the same inside each head")
            first = folded.setdefault(shared.name, value)
            if not torch.equal(first, value):
                raise _refusal(group, f"it is not that of {shared.groups[0].name}")
    return folded


def _refusal(group: ChannelGroup, reason: str) -> ConfigError:
    hint = "expected permutation.constraint=foldable, or export=gathered for any permutation"
    return ConfigError(f"the permutation of {group.name} does not fold: {reason}; {hint}")
