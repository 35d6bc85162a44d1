"""The learning of masks, whatever their scores are: windows of layers in turn, in orders that are given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.config import RunConfig
from permllm.mask.base import LearnedMask, MaskPlan
from permllm.mask.learner import MaskLearner
from permllm.models.families import ChannelGroup, linear_at
from permllm.runs.masks import PackedMasks, unpacked_mask
from permllm.runs.names import MASK_CHECKPOINT
from permllm.runtime.values import SETTINGS, Count, Whole
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.problem import LearningProblem
from permllm.training.scores import Scores
from permllm.training.settings import LearningSettings
from permllm.training.stages import Course
from permllm.training.stand_ins import kernels_for, learning_scores


@dataclass(kw_only=True, config=SETTINGS)
class MaskLearning(LearningSettings, LearnedMask):
    """Base of the masks that are learned. A subclass says what scores a mask is chosen by."""

    epochs: Count = 1
    select_from: Whole = 0
    kind: ClassVar[type[Scores]]

    @override
    def needs_device(self) -> str | None:
        return self.keeps_all_layers("mask")

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        self.check_last_layers("mask", groups, layers)

    @abstractmethod
    def scores(self, weight: Tensor, factors: SaliencyFactors, generator: torch.Generator) -> Scores:
        """What the mask of a linear is chosen by, from its weight `(C_out, C_in)`; it starts at the pruner's mask."""

    @abstractmethod
    def count(self, group: ChannelGroup) -> int:
        """Parameters of the linears of a group."""

    def plan(self, groups: list[ChannelGroup], layers: int) -> MaskPlan:
        """What learns on a model of these groups and so many decoder layers."""
        parameters: dict[int, int] = {}
        for group in groups:
            parameters[group.layer] = parameters.get(group.layer, 0) + self.count(group)
        return MaskPlan(self.spans(layers), parameters, self.kind.keeps_masked)

    def masks(self, problem: LearningProblem, orders: Mapping[str, Tensor]) -> PackedMasks:
        """Learn the masks of all linears; as `permllm.mask.base.LearnedMask`.

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is not.
        """
        course = Course(self, problem, "mask", MASK_CHECKPOINT)
        before = {} if course.state is None else course.state["learner"]["earlier"]
        found: dict[str, Tensor] = {path: bits.cpu() for path, bits in before.items()}

        def mask_of(group: ChannelGroup, path: str) -> Tensor:
            if path in found:
                return unpacked_mask(found[path], linear_at(problem.model, path).weight.shape)
            order = orders[group.name].to(problem.device)
            return permuted_nm_mask(problem.saliency_of(path), order, problem.pattern_of(group))

        def learns(first: int, stop: int) -> bool:
            return any(first <= group.layer < stop for group in problem.groups)

        for window in course.windows(learns, mask_of):
            groups = [group for group in problem.groups if group.layer in window]
            kernels = kernels_for(self, problem, groups)
            generator = torch.Generator().manual_seed(problem.seed + 1 + window.number)
            scores_of = partial(self.scores, generator=generator)
            with learning_scores(problem, groups, orders, scores_of, kernels) as linears:
                learner = MaskLearner(problem, groups, linears, self.learning_rate, found)
                course.train(window, learner)
                found |= learner.best
                del linears, learner  # before those of the next window, which are as large
        return PackedMasks((path, mask_of(group, path).cpu()) for group in problem.groups for path in group.members)
