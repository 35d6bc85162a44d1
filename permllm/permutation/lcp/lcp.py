"""Learnable channel permutation: settings, start, and learning in stages (PermLLM, section 4).

All logits of a stage learn together, end to end, towards the dense output of the stage's last
layer. The weights do not change. Forward uses hard permutations and hard masks; backward goes
through the soft permutations.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, decoder_layers
from permllm.permutation.base import Constraint, LearnedPermutation
from permllm.permutation.foldable import (
    SharedPermutation,
    check_segments,
    expanded,
    permutations_within,
    shared_permutations,
)
from permllm.permutation.heuristic import heuristic_permutations
from permllm.permutation.lcp.permutation_learner import PermutationLearner, members
from permllm.permutation.lcp.permutation_linear import PermutationLinear, StraightThrough
from permllm.permutation.lcp.sinkhorn import BlockLogits
from permllm.settings.config import NMPattern, RunConfig
from permllm.settings.learning import LearningPlan, LearningSettings
from permllm.settings.values import SETTINGS, Amount, Count, Whole
from permllm.sparsity.nm import permuted_nm_mask
from permllm.store.files import LCP_CHECKPOINT
from permllm.training.kernels import Kernels, chosen_kernels
from permllm.training.learner import Progress, Stage, on_cpu
from permllm.training.problem import LearningProblem, replaced_linears
from permllm.training.trainer import StageSchedule

log = logging.getLogger(__name__)


@dataclass(kw_only=True, config=SETTINGS)
class LCP(LearningSettings, LearnedPermutation):
    """Learnable channel permutation; `conf/permutation/lcp.yaml` explains its settings.

    `conf/permutation/lcp-paper.yaml` explains `norm_tokens`, which needs `conventions=paper`.
    """

    block_size: Count
    temperature: Callable[[float], float]
    constraint: Constraint
    init: Literal["heuristic", "random"]
    conventions: Literal["ours", "paper"]
    norm_tokens: Count | None = None
    sinkhorn_iterations: Whole
    straight_through: StraightThrough
    margin: Amount
    noise: Amount

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conventions == "ours":
            if self.norm_tokens:
                raise ValueError(f"norm_tokens={self.norm_tokens} needs conventions=paper")
            self.norm_tokens = 1

    @property
    def searches(self) -> bool:  # type: ignore[override]
        """Tell whether a permutation starts at the heuristic's, or stays there."""
        return self.init == "heuristic" or self.last_layers is not None

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        """Raise ConfigError if a permutation cannot fold or be cut into blocks, or none learns."""
        pattern = config.pattern
        if self.block_size % pattern.m:
            raise ConfigError(
                f"block_size={self.block_size} is not a multiple of M = {pattern.m} "
                f"(sparsity={pattern}); expected {pattern.m}, {2 * pattern.m}, ..."
            )
        check_segments(shared_permutations(groups, self.constraint), pattern)
        if all(group.channels < self.block_size for group in groups):
            log.warning("block_size=%d: no group has so many channels", self.block_size)
        self.check_last_layers("permutation", groups, layers)
        if not self.plan(groups, layers, pattern).parameters:
            raise ConfigError(
                f"permutation.layers_per_stage={self.layers_per_stage}, permutation.last_layers="
                f"{self.last_layers}: no stage holds all layers that share a permutation, so none "
                "would learn; expected layers_per_stage=all and last_layers=null"
            )

    @override
    def plan(self, groups: list[ChannelGroup], layers: int, pattern: NMPattern) -> LearningPlan:
        """Return the plan for a model with these pruned groups and this number of layers."""
        shared = shared_permutations(groups, self.constraint)
        spans = self.spans(layers)
        learned = 0
        for span in spans:
            for permutation in permutations_within(shared, span):
                for stack in permutation.stacks(self.block_size):
                    learned += stack.count * stack.size**2
        return LearningPlan(spans, learned)

    @override
    def permutations(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Learn the permutations of all groups, stage by stage."""
        shared = shared_permutations(problem.groups, self.constraint)
        schedule = StageSchedule(self, problem, "lcp", LCP_CHECKPOINT)
        if schedule.state is None:
            spans = self.spans(len(decoder_layers(problem.model)))
            permutations = self.start_permutations(problem, shared, spans[0].start)
        else:
            permutations = on_cpu(schedule.state["learner"]["best"])
        shared_of = {
            group.name: permutation for permutation in shared for group in permutation.groups
        }

        def present_mask(group: ChannelGroup, path: str) -> Tensor:
            saliency = problem.saliency_of(path)
            permutation = shared_of[group.name]
            columns = permutation.expand(permutations[permutation.name]).to(saliency.device)
            return permuted_nm_mask(saliency, columns, problem.pattern)

        for stage in schedule.stages(
            lambda span: bool(permutations_within(shared, span)), present_mask
        ):
            learning = permutations_within(shared, stage.layers)
            logits = self.start_logits(problem, learning, permutations)
            groups = [group for permutation in learning for group in permutation.groups]
            kernels = chosen_kernels(self, problem, groups)
            with self.masked_linears(problem, shared, stage, kernels) as linears:
                learner = self.learner(shared, permutations, logits, linears)
                schedule.train(stage, learner)
                permutations = learner.best
                del logits, learner  # frees their memory before the next stage
        return expanded(shared, permutations)

    def masked_linears(
        self,
        problem: LearningProblem,
        shared: list[SharedPermutation],
        stage: Stage,
        kernels: Kernels,
    ) -> AbstractContextManager[dict[str, PermutationLinear]]:
        """Replace the linears of a stage by masked linears inside the returned context.

        Their weights are stored column by column, so that a permutation of channels gathers rows.
        """
        stacks = {
            group: permutation.stacks(self.block_size, permutation.repeats)
            for permutation, group in members(shared, stage.layers)
        }

        def masked_linear(group: ChannelGroup, path: str, linear: nn.Linear) -> PermutationLinear:
            factors = problem.factors_of(path)
            if self.conventions == "ours":  # sets the sharpness of the softmax alone
                mean = problem.saliency_of(path).mean()
                scale = 1.0 / mean.clamp_min(torch.finfo(torch.float32).tiny)
                factors = replace(factors, column=factors.column * scale)
            return PermutationLinear(
                linear,
                factors,
                problem.pattern,
                stacks[group],
                self.straight_through,
                kernels,
            )

        return replaced_linears(
            problem.model,
            stacks,
            masked_linear,
            change=lambda _, weight: weight.t().contiguous().t(),
            back=lambda _, weight: weight.contiguous(),
        )

    def learner(
        self,
        shared: list[SharedPermutation],
        permutations: dict[str, Tensor],
        logits: dict[str, BlockLogits],
        linears: dict[str, PermutationLinear],
    ) -> PermutationLearner:
        """Return the learner of a stage; the arguments are those of `PermutationLearner`."""

        def temperature(progress: Progress) -> float:
            if self.conventions == "paper":
                return self.temperature(progress.epoch / progress.epochs)
            return self.temperature(progress.step / max(1, progress.steps - 1))

        half_iterations = 2 * self.sinkhorn_iterations
        if half_iterations == 0 and self.conventions == "paper":
            # The paper's released code starts with a softmax over rows. This is the first half of
            # the first iteration, if there is an iteration.
            half_iterations = 1
        return PermutationLearner(
            shared, permutations, logits, linears, temperature, half_iterations
        )

    def start_permutations(
        self, problem: LearningProblem, shared: list[SharedPermutation], first: int
    ) -> dict[str, Tensor]:
        """Return the shared permutations at the start, int64 on the CPU by name.

        With `init=random` they are the identity in all layers that learn, from `first` on.
        """
        identities = {
            permutation.name: torch.arange(permutation.channels)
            for permutation in shared
            if self.init == "random" and permutation.layers.start >= first
        }
        searched = [permutation for permutation in shared if permutation.name not in identities]
        return identities | heuristic_permutations(searched, problem, "start permutation")

    def start_logits(
        self,
        problem: LearningProblem,
        learning: list[SharedPermutation],
        permutations: dict[str, Tensor],
    ) -> dict[str, BlockLogits]:
        """Return the logits of each permutation at the start, on the device.

        Let U be uniform in [-1, 1]. With `init=heuristic` the logits are `margin I + noise U`,
        relative to the given permutations. With `init=random` (the paper) they are `U / sqrt(B)`,
        with a learnable scale that starts at sqrt(B).
        """
        scale = math.sqrt(self.block_size) if self.init == "random" else None
        generator = torch.Generator().manual_seed(problem.seed)
        dtype = torch.promote_types(next(problem.model.parameters()).dtype, torch.float32)
        logits = {}
        for permutation in learning:
            stacks = permutation.stacks(self.block_size)
            start = []
            for stack in stacks:
                shape = (stack.count, stack.size, stack.size)
                uniform = torch.rand(shape, generator=generator) * 2 - 1
                if scale is None:
                    start.append(self.margin * torch.eye(stack.size) + self.noise * uniform)
                else:
                    start.append(uniform / scale)
            blocks = BlockLogits(permutations[permutation.name], stacks, start, scale)
            logits[permutation.name] = blocks.to(problem.device, dtype)
        return logits
