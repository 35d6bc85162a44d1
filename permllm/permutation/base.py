"""Base classes of the permutation methods."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.settings.config import NMPattern
from permllm.settings.learning import LearningPlan
from permllm.sparsity.method import Method
from permllm.training.problem import LearningProblem

Constraint = Literal["free", "foldable"]


class Permutation(Method, ABC):
    """Base of all methods, which permute the channel groups of the whole dense model.

    Attributes:
        local: the method has `permutation`, which finds that of one channel group from its saliency
            alone, also if this saliency is not the dense model's.
        searches: the method searches for permutations by `permllm.permutation.heuristic`.
        constraint: constraint of the permutations (see `permllm.permutation.foldable`); None:
            unknown until they are found.
        norm_tokens: number of tokens that count as one in a norm of the dense model's inputs;
            None: those of a calibration window.
    """

    local: bool = False
    searches: bool = False
    constraint: Constraint | None = "free"
    norm_tokens: int | None = 1

    @abstractmethod
    def permutations(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Return the permutations, int64 `(C_in,)` on the CPU, by group."""


class LocalPermutation(Permutation):
    """Base of the methods that can permute one channel group at a time."""

    local = True

    @abstractmethod
    def permutation(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the permutation of a group, int64 `(C_in,)`.

        Args:
            group: name of the group.
            saliency: `(rows of all members, C_in)`.
            pattern: N:M of the group.
        """

    @override
    def permutations(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Return the permutation of each group by its saliency in the dense model."""
        permutations = {}
        for group in problem.groups:
            scores = torch.cat([problem.saliency_of(path) for path in group.members])
            permutations[group.name] = self.permutation(group.name, scores, problem.pattern)
        return permutations


class LearnedPermutation(Permutation):
    """Base of the methods that train, in all ranks together."""

    learned = True
    needs_dense_statistics = True

    @abstractmethod
    def plan(self, groups: list[ChannelGroup], layers: int, pattern: NMPattern) -> LearningPlan:
        """Return the plan for a model with these pruned groups and this number of layers."""
