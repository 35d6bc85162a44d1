"""What a mask method is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from permllm.calibration.statistics.base import Statistics
from permllm.learning.problem import LearningProblem
from permllm.models.families import ChannelGroup


class Mask(Protocol):
    """What every method has.

    Attributes:
        learned: it trains (`LearnedMask`).
        local: the pruner chooses the masks of a linear when it is pruned; otherwise they are all found before (`FoundMask`).
    """

    learned: bool
    local: bool


class FoundMasks(NamedTuple):
    """What a method has found, all of it on the CPU.

    Attributes:
        orders: int64 `(C_in,)` by group.
        masks: bool `(C_out, C_in)` by linear, original channel order; each group of M in the order keeps N.
    """

    orders: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]


class FoundMask(Mask, Protocol):
    """Finds the masks of all linears together; where it does not train, the first process of torchrun does.

    Attributes:
        statistics: of what the linears read, that it sums over the calibration text (`permllm.calibration.statistics`).
        learns_orders: the orders learn with the masks, by the settings of the permutation.
    """

    statistics: Statistics
    learns_orders: bool

    def masks(
        self, problem: LearningProblem, orders: Mapping[str, Tensor], permutation: Any
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | FoundMasks:
        """The orders and masks, as `FoundMasks` has them.

        Args:
            problem: what they are found for.
            orders: of all groups; where orders learn too, those of the permutation's start.
            permutation: the method that found them.
        """


@dataclass(frozen=True)
class MaskPlan:
    """What a learned mask will do, for `plan=true`.

    Attributes:
        windows: first decoder layer and the one after the last of what learns together, one after the other.
        parameters: that masks are chosen by and learn, by decoder layer; orders are not among them.
        keeps_masked: masked weights wait for backward.
    """

    windows: list[tuple[int, int]]
    parameters: dict[int, int]
    keeps_masked: bool = False


class LearnedMask(FoundMask, Protocol):
    """Trains, in all processes of torchrun together.

    Attributes:
        batch_size: samples a step.
    """

    batch_size: int

    def plan(self, groups: list[ChannelGroup], layers: int) -> MaskPlan:
        """What it will learn on a model of these groups and so many decoder layers."""
