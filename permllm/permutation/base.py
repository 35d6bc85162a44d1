"""What a permutation method is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern, RunConfig
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.runs.masks import is_permutation
from permllm.sparsity.method import Method, check_dense_statistics
from permllm.training.problem import LearningProblem

Constraint = Literal["free", "foldable"]


class Permutation(Method, ABC):
    """Base of all methods, which order the channel groups of the whole dense model.

    Attributes:
        local: `order` gives the order of one channel group from its saliency alone, also where that is not the dense model's.
        constraint: that its orders keep (see `permllm.permutation.foldable`); None where that is not known before.
    """

    local: bool = False
    constraint: Constraint | None = "free"

    @abstractmethod
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Return the orders, int64 `(C_in,)` on the CPU, by group."""


class LocalPermutation(Permutation):
    """Base of the methods that can order one channel group at a time."""

    local = True

    @abstractmethod
    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the order of a group, int64 `(C_in,)`, for `saliency (rows of all members, C_in)`."""

    @override
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        def found(group: ChannelGroup) -> Tensor:
            scores = torch.cat([problem.saliency_of(path) for path in group.members])
            return self.order(group.name, scores, problem.pattern_of(group))

        return {group.name: found(group) for group in problem.groups}


class LearnedPermutation(Permutation):
    """Base of the methods that train, in all ranks together.

    Attributes:
        batch_size: samples a step.
    """

    learned = True
    batch_size: int

    @override
    def validate(self, config: RunConfig) -> None:
        check_dense_statistics(config, "permutation")

    @abstractmethod
    def plan(self, groups: list[ChannelGroup], layers: int) -> LearningPlan:
        """Return what it will learn on a model.

        Args:
            groups: channel groups that are pruned.
            layers: number of decoder layers.
        """


@dataclass(frozen=True)
class LearningPlan:
    """What a learned method will do, for `plan=true`.

    Attributes:
        windows: first decoder layer and the one after the last of what learns together, one after the other.
        blocks: by channel group, how its channels are cut, for a person.
        sizes: by channel group, how many parameters its order has, for a person.
        logits: parameters that belong to channels.
        parameters: all that learn.
        stays: names of the orders that do not learn.
    """

    windows: list[tuple[int, int]]
    blocks: dict[str, str]
    sizes: dict[str, str]
    logits: int
    parameters: int
    stays: list[str]


def checked_order(key: str, group: str, channels: int, order: object) -> Tensor:
    """The order of a channel group that a method has given, on the CPU.

    Args:
        key: the setting that named the method.
        group: name of the group.
        channels: of it.
        order: what was given.

    Raises:
        ConfigError: it is no int64 permutation of the channels: a model in it would not be N:M.
    """
    reason = None
    if not isinstance(order, Tensor):
        reason = f"it is a {type(order).__name__}"
    elif order.dtype != torch.int64 or order.shape != (channels,):
        reason = f"it is {str(order.dtype).removeprefix('torch.')} {tuple(order.shape)}"
    elif not is_permutation(order):
        reason = "some channels stand in it twice and others never"
    if reason is not None:
        raise ConfigError(f"{key}: the order of {group} must be a permutation, int64 ({channels},), and {reason}")
    assert isinstance(order, Tensor)
    return order.cpu()
