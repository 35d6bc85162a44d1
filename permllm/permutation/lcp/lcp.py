"""Learnable channel permutation (PermLLM, section 4): the settings, the start, and the windows of layers in turn.

All logits of a window of decoder layers learn together, end to end, against the dense model's
output of the window's last layer. The weights stay as they are. Forward uses hard permutations and
hard masks; backward goes through the soft ones.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.config import RunConfig
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, decoder_layers
from permllm.permutation.base import LearningPlan
from permllm.permutation.foldable import (
    SharedOrder,
    check_segments,
    expanded,
    orders_within,
    shared_orders,
)
from permllm.permutation.heuristic import heuristic_orders
from permllm.permutation.lcp.learner import OrderLearner, members
from permllm.permutation.lcp.logits import BlockLogits
from permllm.permutation.lcp.settings import LCPSettings
from permllm.runs.files import CHECKPOINT
from permllm.runtime.values import SETTINGS
from permllm.sparsity.nm import permuted_nm_mask
from permllm.training.blocks import count_logits
from permllm.training.kernels import Kernels
from permllm.training.learner import Window
from permllm.training.masked_linear import MaskedLinear
from permllm.training.problem import LearningProblem
from permllm.training.scores import Scores
from permllm.training.stages import Course
from permllm.training.stand_ins import kernels_for, learning_orders


@dataclass(kw_only=True, config=SETTINGS)
class LCP(LCPSettings):
    """The method; its settings are those of `LCPSettings`."""

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        check_segments(shared_orders(groups, self.constraint), config.pattern)
        self.check_last_layers("permutation", groups, layers)
        plan = self.plan(groups, layers)
        if not plan.logits:
            raise ConfigError(
                f"no order would learn: {', '.join(plan.stays) or 'each'} learns only in a stage that holds all layers that "
                "share it, as by permutation.layers_per_stage=all and all layers"
            )

    @override
    def plan(self, groups: list[ChannelGroup], layers: int) -> LearningPlan:
        shared, spans = shared_orders(groups, self.constraint), self.spans(layers)
        learning = [order for first, stop in spans for order in orders_within(shared, first, stop)]
        columns: dict[str, tuple[str, str]] = {}
        for order in shared:
            stacks, sharing = order.stacks(self.block_size), ""
            if len(order.groups) > 1:
                sharing = f", shared as {order.name}"
            elif order.repeats > 1:
                sharing = f", shared as {order.channels // order.segment} heads of {order.segment}, each {order.repeats} times"
            blocks = f"{sum(stack.count for stack in stacks)} of at most {max(stack.size for stack in stacks)}"
            columns |= {
                group.name: (blocks, f"{count_logits(stacks)}{sharing}") for group in order.groups
            }
        logits = sum(count_logits(order.stacks(self.block_size)) for order in learning)
        stays = [order.name for order in shared if order not in learning and len(order.groups) > 1]
        return LearningPlan(spans, columns, logits, stays)

    @override
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        shared = shared_orders(problem.groups, self.constraint)
        course = Course(self, problem, "lcp", CHECKPOINT)
        if course.state is not None:
            orders = {name: order.cpu() for name, order in course.state["learner"]["best"].items()}
        else:
            orders = self.start_orders(
                problem, shared, self.spans(len(decoder_layers(problem.model)))[0][0]
            )
        used_by = {group.name: order for order in shared for group in order.groups}

        def mask_of(group: ChannelGroup, path: str) -> Tensor:
            score, order = problem.saliency_of(path), used_by[group.name]
            perm = order.expand(orders[order.name]).to(score.device)
            return permuted_nm_mask(score, perm, problem.pattern_of(group))

        for window in course.windows(
            lambda first, stop: bool(orders_within(shared, first, stop)), mask_of
        ):
            learning = orders_within(shared, window.first, window.stop)
            logits = self.start_logits(problem, learning, orders)
            kernels = kernels_for(
                self, problem, [group for order in learning for group in order.groups]
            )
            with self.masked(problem, shared, window, kernels) as linears:
                learner = OrderLearner(self, problem, shared, window, orders, logits, linears)
                course.train(window, learner)
                orders = learner.best
                del logits, learner  # before what the next window needs
        return expanded(shared, orders)

    def masked(
        self, problem: LearningProblem, shared: list[SharedOrder], window: Window, kernels: Kernels
    ) -> AbstractContextManager[dict[str, list[MaskedLinear]]]:
        """Put masked linears, by the pruner's saliency, into a window of the problem's model; `shared` are its orders."""

        def scores_of(path: str) -> Scores:
            factors = problem.factors_of(path)
            if self.conventions == "ours":
                factors = factors.scaled(
                    1.0
                    / problem.saliency_of(path).mean().clamp_min(torch.finfo(torch.float32).tiny)
                )
            return Scores(factors)

        places = (
            (group, order.stacks(self.block_size, order.repeats))
            for order, group in members(shared, window)
        )
        return learning_orders(problem, places, scores_of, self.straight_through, kernels)

    def start_orders(
        self, problem: LearningProblem, shared: list[SharedOrder], first: int
    ) -> dict[str, Tensor]:
        """Return the orders at the start, which layers before `first` keep; int64 on the CPU by shared order."""
        drawn = [order for order in shared if self.init == "random" and order.layers.start >= first]
        found = heuristic_orders(
            [order for order in shared if order not in drawn], problem, "start permutation"
        )
        return {
            order.name: torch.arange(order.channels) if order in drawn else found[order.name]
            for order in shared
        }

    def start_logits(
        self, problem: LearningProblem, learning: list[SharedOrder], orders: dict[str, Tensor]
    ) -> dict[str, BlockLogits]:
        """Return the logits of each order at the start, on the device: near the given orders, or the paper's random ones."""
        near = self.init == "heuristic"
        generator = torch.Generator().manual_seed(problem.seed)
        dtype = torch.promote_types(next(problem.model.parameters()).dtype, torch.float32)
        logits = {}
        for order in learning:
            stacks, start = order.stacks(self.block_size), []
            for stack in stacks:
                uniform = (
                    torch.rand(stack.count, stack.size, stack.size, generator=generator) * 2 - 1
                )
                if near:
                    start.append(self.margin * torch.eye(stack.size) + self.noise * uniform)
                else:
                    start.append(uniform / math.sqrt(self.block_size))
            scale = None if near else math.sqrt(self.block_size)
            logits[order.name] = BlockLogits(orders[order.name], stacks, start, scale).to(
                problem.device, dtype
            )
        return logits
