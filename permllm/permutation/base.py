"""Contracts of the permutation methods, and the one that leaves the channels where they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.runs.tensors import is_permutation
from permllm.sparsity.method import Method
from permllm.training.problem import LearningProblem

Constraint = Literal["free", "foldable"]


class Permutation(Method, ABC):
    """Base of all methods, which order the channel groups of the whole dense model.

    Attributes:
        local: `order` gives the permutation of one channel group from its saliency alone, also
            where that is not the dense model's.
        constraint: of its permutations (see `permllm.permutation.foldable`); None: unknown before.
    """

    local: bool = False
    constraint: Constraint | None = "free"

    @abstractmethod
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Return the permutations, int64 `(C_in,)` on the CPU, by group."""


class LocalPermutation(Permutation):
    """Base of the methods that can order one channel group at a time."""

    local = True

    @abstractmethod
    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the permutation of a group, int64 `(C_in,)`.

        Args:
            group: its name.
            saliency: `(rows of all members, C_in)`.
            pattern: N:M of the group.
        """

    @override
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        found = {}
        for group in problem.groups:
            scores = torch.cat([problem.saliency_of(path) for path in group.members])
            found[group.name] = self.order(group.name, scores, problem.pattern_of(group))
        return found


class Identity(LocalPermutation):
    """The identity for every channel group."""

    constraint = "foldable"  # it folds into anything

    @override
    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        return torch.arange(saliency.shape[1])

    @override
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        return {group.name: torch.arange(group.channels) for group in problem.groups}


@dataclass(frozen=True)
class LearningPlan:
    """Plan of a learned permutation, for `plan=true`.

    Attributes:
        windows: first decoder layer and the one after the last of each window.
        columns: by channel group, its blocks and its number of parameters, as text.
        logits: parameters that learn.
        stays: names of the shared permutations that do not learn.
    """

    windows: list[tuple[int, int]]
    columns: dict[str, tuple[str, str]]
    logits: int
    stays: list[str]


class LearnedPermutation(Permutation):
    """Base of the methods that train, in all ranks together.

    Attributes:
        batch_size: samples a step.
    """

    learned = True
    found_dense = "permutation"
    batch_size: int

    @abstractmethod
    def plan(self, groups: list[ChannelGroup], layers: int) -> LearningPlan:
        """Return the plan for a model.

        Args:
            groups: channel groups that are pruned.
            layers: number of decoder layers.
        """


def checked_order(key: str, group: str, channels: int, order: object) -> Tensor:
    """Return the permutation of a channel group that a method has given, on the CPU.

    Args:
        key: the setting that named the method.
        group: name of the group.
        channels: of it.
        order: the method's result.

    Raises:
        ConfigError: it is no int64 permutation of the channels: a model in it would not be N:M.
    """
    if not isinstance(order, Tensor):
        given = type(order).__name__
    elif order.dtype == torch.int64 and order.shape == (channels,) and is_permutation(order):
        return order.cpu()
    else:
        given = f"{order.dtype} {tuple(order.shape)}"
    raise ConfigError(
        f"{key}: the order of {group} must be a permutation, int64 ({channels},) with each channel "
        f"once, and it is {given}"
    )
