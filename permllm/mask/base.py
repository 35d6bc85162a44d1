"""Contracts of the mask methods, and the one that leaves masks to the pruner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from permllm.models.families import ChannelGroup
from permllm.sparsity.method import Method
from permllm.sparsity.statistics import Statistics
from permllm.training.problem import LearningProblem


class Mask(Method):
    """Base of all methods; itself `mask=pruner`, which finds nothing.

    Attributes:
        local: the pruner chooses the masks of a linear when it is pruned; otherwise they are all
            found before (`FoundMask`).
    """

    local: bool = True


class FoundMask(Mask, ABC):
    """Base of the methods that find the masks of all linears together, in all ranks.

    Attributes:
        statistics: of the linears' inputs, which the method sums over the calibration text
            (`permllm.sparsity`).
    """

    local = False
    found_dense = "mask"
    statistics: Statistics = ()

    @abstractmethod
    def masks(self, problem: LearningProblem, orders: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the masks by linear, bool `(C_out, C_in)` on the CPU, in original channel order.

        Args:
            problem: model, samples and targets.
            orders: int64 `(C_in,)` on the CPU by channel group.
        """


@dataclass(frozen=True)
class MaskPlan:
    """Plan of a learned mask, for `plan=true`.

    Attributes:
        windows: first decoder layer and the one after the last of each window.
        parameters: number of parameters that learn, by decoder layer.
        keeps_masked: masked weights wait for backward.
    """

    windows: list[tuple[int, int]]
    parameters: dict[int, int]
    keeps_masked: bool = False


class LearnedMask(FoundMask):
    """Base of the methods that train, in all ranks together.

    Attributes:
        batch_size: samples a step.
    """

    learned = True
    batch_size: int

    @abstractmethod
    def plan(self, groups: list[ChannelGroup], layers: int) -> MaskPlan:
        """Return the plan for a model of these groups and so many decoder layers."""
