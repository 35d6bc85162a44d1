"""What a mask method is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from permllm.models.families import ChannelGroup
from permllm.sparsity.statistics import Statistics
from permllm.training.problem import LearningProblem


class Mask(Protocol):
    """What every method has.

    Attributes:
        learned: it trains (`LearnedMask`).
        local: the pruner chooses the masks of a linear when it is pruned; otherwise they are all found before (`FoundMask`).
    """

    learned: bool
    local: bool


class FoundMask(Mask, Protocol):
    """Finds the masks of all linears together; where it does not train, the first process of torchrun does.

    Attributes:
        statistics: of what the linears read, that it sums over the calibration text (`permllm.sparsity`).
    """

    statistics: Statistics

    def masks(self, problem: LearningProblem, orders: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The masks by linear, bool `(C_out, C_in)` on the CPU, original channel order; N of each M in the order are kept.

        Args:
            problem: what they are found for.
            orders: int64 `(C_in,)` on the CPU by channel group.
        """


@dataclass(frozen=True)
class MaskPlan:
    """What a learned mask will do, for `plan=true`.

    Attributes:
        windows: first decoder layer and the one after the last of what learns together, one after the other.
        parameters: that masks are chosen by and learn, by decoder layer.
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
