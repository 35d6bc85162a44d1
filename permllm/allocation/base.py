"""Base classes of the allocations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from permllm.models.families import ChannelGroup
from permllm.sparsity.method import Method
from permllm.training.problem import LearningProblem


class Allocation(Method):
    """Base of all methods, which choose the linears to prune.

    Attributes:
        uniform: True: `keep_dense` decides alone. False: a `FoundAllocation` keeps more linears
            dense after calibration.
        windows: number of calibration windows whose forward is repeated for each channel group.
    """

    uniform: bool = True
    windows: int = 0


class FoundAllocation(Allocation, ABC):
    """Base of the methods that find linears to keep dense, from the dense model."""

    uniform = False
    needs_dense_statistics = True

    def sensitivity(self, problem: LearningProblem) -> dict[str, float]:
        """Return how much the pruning of a channel group hurts, by group; by default, nothing.

        Args:
            problem: problem with the dense model, and the groups that the settings prune.
        """
        return {}

    @abstractmethod
    def dense_linears(
        self, problem: LearningProblem, every: list[ChannelGroup], sensitivity: Mapping[str, float]
    ) -> set[str]:
        """Return the paths of the linears to keep dense, besides those of `keep_dense`.

        Args:
            problem: as in `sensitivity`.
            every: all channel groups of the model.
            sensitivity: result of `sensitivity`.
        """
