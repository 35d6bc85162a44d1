"""Base classes of the mask methods."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from permllm.models.families import ChannelGroup
from permllm.settings.config import NMPattern
from permllm.settings.learning import LearningPlan
from permllm.sparsity.method import Method
from permllm.training.problem import LearningProblem


class Mask(Method, ABC):
    """Base of the methods that find the masks of all linears together, in all ranks.

    Their `statistics`, sums over the calibration text, are for `plan=true`; they collect them.
    """

    needs_dense_statistics = True

    @abstractmethod
    def masks(
        self, problem: LearningProblem, permutations: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the masks by linear, bool `(C_out, C_in)` on the CPU, in original channel order.

        Args:
            problem: model, text and targets.
            permutations: permutations, int64 `(C_in,)` on the CPU by channel group.
        """


class LearnedMask(Mask):
    """Base of the methods that train, in all ranks together."""

    learned = True

    @abstractmethod
    def plan(self, groups: list[ChannelGroup], layers: int, pattern: NMPattern) -> LearningPlan:
        """Return the plan for a model with these pruned groups and this number of layers."""
