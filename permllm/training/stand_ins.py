"""Masked linears that replace a model's linears while permutations or scores learn."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

from permllm.models.families import ChannelGroup, linear_at
from permllm.models.offload import placement_of
from permllm.sparsity.blocks import BlockStack
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.kernels import Kernels, chosen_kernels
from permllm.training.masked_linear import MaskedLinear
from permllm.training.problem import LearningProblem
from permllm.training.scores import Scores
from permllm.training.settings import LearningSettings, StraightThrough

# Context that gives the masked linears by the name of their group.
StandIns = AbstractContextManager[dict[str, list[MaskedLinear]]]


def learning_orders(
    problem: LearningProblem,
    stacks: Mapping[ChannelGroup, list[BlockStack]],
    scores_of: Callable[[str], Scores],
    straight_through: StraightThrough,
    kernels: Kernels,
) -> StandIns:
    """Replace the linears of some groups by masked linears whose permutations learn.

    Until the linears come back, the weights are stored column by column, so that a permutation of
    channels gathers rows.

    Args:
        problem: problem with the model.
        stacks: blocks of each group's positions.
        scores_of: returns the scores of the linear at a path.
        straight_through, kernels: as in `MaskedLinear`.
    """

    def stand_in(group: ChannelGroup, path: str, linear: nn.Linear) -> MaskedLinear:
        pattern = problem.pattern_of(group)
        return MaskedLinear(
            linear, scores_of(path), pattern, stacks[group], straight_through, kernels=kernels
        )

    return _standing_in(
        problem.model,
        stacks,
        stand_in,
        change=lambda _, weight: weight.t().contiguous().t(),
        back=lambda _, weight: weight.contiguous(),
    )


def learning_scores(
    problem: LearningProblem,
    groups: Iterable[ChannelGroup],
    orders: Mapping[str, Tensor],
    scores_of: Callable[[Tensor, SaliencyFactors], Scores],
    kernels: Kernels,
) -> StandIns:
    """Replace the linears of some groups by masked linears whose scores learn.

    The weights are stored permuted until the linears come back.

    Args:
        problem: problem with the model.
        groups: channel groups of the linears.
        orders: the permutations, int64 `(C_in,)` by group.
        scores_of: returns the scores of a linear from its weight `(C_out, C_in)` and its saliency
            factors, both permuted.
        kernels: as in `MaskedLinear`.
    """

    @cache  # offloaded layers ask for it at each step
    def order_on(device: torch.device, name: str) -> Tensor:
        return orders[name].to(device)

    def permuted(group: ChannelGroup, weight: Tensor) -> Tensor:
        return weight.t()[order_on(weight.device, group.name)].t()

    def original(group: ChannelGroup, weight: Tensor) -> Tensor:
        return weight.t()[order_on(weight.device, group.name).argsort()].t().contiguous()

    def stand_in(group: ChannelGroup, path: str, linear: nn.Linear) -> MaskedLinear:
        weight = linear.weight.data
        order = order_on(weight.device, group.name)
        scores = scores_of(permuted(group, weight), problem.factors_of(path).permuted(order))
        identity = torch.equal(order, torch.arange(len(order), device=order.device))
        moved = None if identity else order
        return MaskedLinear(linear, scores, problem.pattern_of(group), order=moved, kernels=kernels)

    return _standing_in(problem.model, groups, stand_in, permuted, original)


def kernels_for(
    settings: LearningSettings, problem: LearningProblem, groups: list[ChannelGroup]
) -> Kernels:
    """Return the kernels for the linears of groups that learn together."""
    weights = sum(group.channels * sum(group.rows) for group in groups)
    work = weights * settings.steps_for(len(problem.tokens))
    return chosen_kernels(problem.device, settings.compile, work, map(problem.pattern_of, groups))


@contextmanager
def _standing_in(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    stand_in: Callable[[ChannelGroup, str, nn.Linear], MaskedLinear],
    change: Callable[[ChannelGroup, Tensor], Tensor],
    back: Callable[[ChannelGroup, Tensor], Tensor],
) -> Iterator[dict[str, list[MaskedLinear]]]:
    """Replace every linear of some groups by its masked linear, and undo this at the end.

    Args:
        model: model of a known family.
        groups: channel groups of the linears.
        stand_in: returns the masked linear of the linear at a path; called before `change`.
        change: returns a weight in the layout for learning.
        back: returns such a weight in its original layout.
    """
    placement = placement_of(model)
    replaced: list[tuple[ChannelGroup, str, nn.Linear]] = []
    stand_ins: dict[str, list[MaskedLinear]] = {}
    try:
        for group in groups:
            stand_ins[group.name] = []
            with placement.layer(group.layer):
                for path in group.members:
                    linear = linear_at(model, path)
                    stand_ins[group.name].append(stand_in(group, path, linear))
                    placement.rearrange(linear, partial(change, group))
                    replaced.append((group, path, linear))
                    model.set_submodule(path, stand_ins[group.name][-1])
        yield stand_ins
    finally:
        for group, path, linear in replaced:
            placement.restore(linear, partial(back, group))
            model.set_submodule(path, linear)
