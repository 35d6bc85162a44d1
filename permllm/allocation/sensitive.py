"""Allocation that keeps the most sensitive channel groups dense.

A channel group is the unit, because servers join the linears that read the same channels.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.allocation.base import Allocation
from permllm.errors import TrainingError
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.layers import LayerStream, replaced_forwards
from permllm.models.offload import masked, placement_of
from permllm.runtime import parallel
from permllm.runtime.memory import to_device
from permllm.settings.values import SETTINGS, Count
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.statistics import by_layer
from permllm.training.losses import loss_named
from permllm.training.problem import LearningProblem


@dataclass(kw_only=True, config=SETTINGS)
class Sensitive(Allocation):
    """Allocation that keeps the groups dense whose pruning hurts most for each weight."""

    share: Annotated[float, Field(ge=0, lt=1)]
    windows: Count

    @override
    @torch.no_grad()
    def sensitivity(self, problem: LearningProblem) -> dict[str, float]:
        """Return the divergence of the next tokens when one channel group alone is pruned.

        It is `KL(dense || pruned)` in nats, mean over tokens. The masks are the pruner's without a
        permutation. Each rank measures every n-th group. Sharded layers are the exception: all
        ranks enter a layer together, so each measures all groups.

        Raises TrainingError if a divergence is not finite.
        """
        tokens = problem.tokens[: self.windows]
        distance = loss_named("kl", problem.model, tokens.numel(), compile_=False)
        mine = problem.groups[parallel.rank() :: parallel.world_size()]
        measured = problem.groups if placement_of(problem.model).sharded else mine
        values = torch.zeros(len(problem.groups), dtype=torch.float64, device=problem.device)
        stream = LayerStream(
            problem.model, tokens, problem.calibration_batch_size, already_split=True
        )
        for index, groups in by_layer(problem.model, problem.groups, "sensitivity"):
            for group in groups:
                if group in measured:
                    output = _output(problem, stream.copy(), group)
                    total = 0.0
                    for windows in torch.arange(len(tokens)).split(problem.calibration_batch_size):
                        ends = to_device(output[windows], problem.device)
                        dense = to_device(problem.target[windows], problem.device)
                        total += float(distance(ends, dense, tokens[windows])) * len(windows)
                    if not math.isfinite(total):
                        raise TrainingError(
                            f"the divergence of the model with {group.name} alone pruned is not "
                            "finite; try model.dtype=float32"
                        )
                    if group in mine:
                        values[problem.groups.index(group)] = total / len(tokens)
            stream.advance(index)
        parallel.all_reduce([values])
        names = [group.name for group in problem.groups]
        return dict(zip(names, values.tolist(), strict=True))

    @override
    def dense_linears(
        self, problem: LearningProblem, every: list[ChannelGroup], sensitivity: Mapping[str, float]
    ) -> set[str]:
        """Return the members of the most sensitive groups, as many as the share allows.

        Linears that the settings keep dense count in the share.
        """
        allowed = self.share * sum(group.weights for group in every)
        allowed -= sum(group.weights for group in every)
        allowed += sum(group.weights for group in problem.groups)
        dense: set[str] = set()
        for group in sorted(
            problem.groups, key=lambda group: sensitivity[group.name] / group.weights, reverse=True
        ):
            if group.weights <= allowed:
                allowed -= group.weights
                dense.update(group.members)
        return dense


def _output(problem: LearningProblem, stream: LayerStream, group: ChannelGroup) -> Tensor:
    """Return the output of the last layer with one pruned group, `(windows, tokens, hidden)`.

    Args:
        problem: the problem.
        stream: inputs of the group's layer.
        group: the channel group.
    """
    with ExitStack() as pruned:
        for path in group.members:
            linear = linear_at(problem.model, path)
            mask = nm_mask(problem.saliency_of(path), problem.pattern)
            pruned.enter_context(replaced_forwards([linear], partial(_forward, linear, mask)))
        stream.advance(group.layer)
    for index in range(group.layer + 1, len(decoder_layers(problem.model))):
        stream.advance(index)
    return stream.states()


def _forward(linear: nn.Linear, mask: Tensor, inputs: Tensor) -> Tensor:
    return nn.functional.linear(inputs, masked(mask, linear.weight), linear.bias)
