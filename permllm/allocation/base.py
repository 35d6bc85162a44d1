"""Base classes of the allocations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from permllm.models.families import ChannelGroup
from permllm.sparsity.method import Method
from permllm.training.problem import LearningProblem


class Allocation(Method, ABC):
    """Base of the methods that keep linears dense after calibration, besides `keep_dense`.

    Attributes:
        windows: number of calibration windows whose forward is repeated for each channel group.
    """

    windows: int = 0
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
