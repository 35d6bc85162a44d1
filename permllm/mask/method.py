"""The learning of masks, whatever their scores are: windows of layers in turn, in orders that are fixed or learn with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from permllm.calibration.saliency import SaliencyFactors
from permllm.calibration.statistics.base import Statistics
from permllm.config import WITH_ORDERS
from permllm.learning.course import Course
from permllm.learning.kernels import chosen_kernels
from permllm.learning.masked_linear import PermutedMaskedLinear, masked_linears
from permllm.learning.ordered_linear import OrderedMaskedLinear, ordered_linears
from permllm.learning.problem import LearningProblem
from permllm.learning.scores import Scores
from permllm.learning.training import Checkpoint, Learner, Window, samples_of, steps_of
from permllm.mask.contract import FoundMasks, MaskPlan
from permllm.mask.learner import MaskLearner
from permllm.mask.settings import MaskSettings
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.placement import placement_of
from permllm.permutation.heuristic import Search, search_of, searched
from permllm.permutation.lcp.learner import OrderLearner, members
from permllm.permutation.lcp.method import LCP
from permllm.permutation.shared import SharedOrder, expanded, orders_within, shared_orders
from permllm.record.masks import PackedMasks, unpacked_mask
from permllm.record.names import MASK_CHECKPOINT
from permllm.runtime import parallel
from permllm.sparsity import permuted_nm_mask

ScoresOf: TypeAlias = dict[str, dict[str, Tensor]]
"""Parameters of scores by the path of a linear and their name, channels in the dense model's order."""


ScoresAt: TypeAlias = Callable[..., Scores]
"""What a linear starts from, by its path, weight `(C_out, C_in)` and saliency factors, and the order that both are in, int64
`(C_in,)`; without one, that of the dense model."""


@dataclass
class _Found:
    """What windows have learned so far, all of it on the CPU.

    Attributes:
        present: int64 `(C_in,)` by group, in which learning goes on.
        orders: those that `masks` are N:M in. Of earlier windows a searched order may be present that is not.
        masks: by linear, as `packed_mask` gives them.
    """

    present: dict[str, Tensor]
    orders: dict[str, Tensor]
    masks: dict[str, Tensor]

    @classmethod
    def before(cls, orders: Mapping[str, Tensor], state: Checkpoint | None) -> _Found:
        """What was found before the window of a checkpoint, or before any, in these orders."""
        of_masks = {"orders": {}, "orders_of_earlier": {}, "earlier": {}} if state is None else state["learners"][-1]
        kept = {key: _on_cpu(of_masks[key]) for key in ("orders", "orders_of_earlier", "earlier")}
        present = {**orders, **kept["orders"]}
        return cls(present, present | kept["orders_of_earlier"], kept["earlier"])

    def before_window(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """What a `MaskLearner` has in its checkpoint."""
        return self.masks, self.present, self.orders

    def take(self, learners: list[Learner], again: bool) -> ScoresOf:
        """Have the orders and masks that a window has learned; the scores, where it learns again."""
        *others, masks = learners
        assert isinstance(masks, MaskLearner)
        for learner in others:
            assert isinstance(learner, OrderLearner)
            self.present |= expanded(learner.shared, learner.best)
        if masks.best:
            self.masks |= masks.best
            self.orders |= {group.name: self.present[group.name] for group in masks.groups}
        return masks.scores_of_the_dense_order() if again else {}


class MaskLearning(MaskSettings):
    """What the methods share; what they choose masks by is theirs."""

    learned = True
    local = False
    statistics: ClassVar[Statistics] = ()
    kind: ClassVar[type[Scores]]

    @property
    def learns_orders(self) -> bool:
        """The orders learn with the masks, by descent."""
        return self.orders in WITH_ORDERS

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

    def masks(self, problem: LearningProblem, orders: Mapping[str, Tensor], permutation: Any = None) -> FoundMasks:
        """Learn the masks of all linears; as `permllm.mask.contract.LearnedMask`.

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is not.
        """
        course = Course(self, problem, self.rounds, "mask", MASK_CHECKPOINT, _check)
        found = _Found.before(orders, course.state)

        def mask_of(group: ChannelGroup, path: str) -> Tensor:
            if path in found.masks:
                return unpacked_mask(found.masks[path], linear_at(problem.model, path).weight.shape)
            order = found.orders[group.name].to(problem.device)
            return permuted_nm_mask(problem.saliency_of(path), order, problem.pattern_of(group))

        def learns(first: int, stop: int) -> bool:
            return any(first <= group.layer < stop for group in problem.groups)

        scores: ScoresOf = {}
        for window in course.windows(learns, mask_of):
            if not window.round:
                scores = {}
            if scores and self.orders == "searched":
                search = partial(self._searched, problem, permutation, scores, found.present, window)
                found.present |= parallel.from_first(search)
            start = self._start(problem, window, scores)
            with self._learners(problem, window, found, start, permutation) as learners:
                del start
                scores.clear()  # the learners have them
                course.train(window, learners)
                scores = found.take(learners, again=window.round + 1 < self.rounds)
                del learners  # before those of the next window, which are as large
        masks = PackedMasks((path, mask_of(group, path).cpu()) for group in problem.groups for path in group.members)
        return FoundMasks(found.orders, masks)

    def _searched(
        self,
        problem: LearningProblem,
        permutation: Any,
        scores: ScoresOf,
        present: Mapping[str, Tensor],
        window: Window,
    ) -> dict[str, Tensor]:
        """Orders by group that retain the most of what masks have learned, where that is more than the present ones do.

        They are those that the layers of a window have all groups of.
        """

        def score_of(path: str) -> Tensor:
            with placement_of(problem.model).layer_of(path):
                weight, generator = linear_at(problem.model, path).weight, torch.Generator()
                learned = self.scores(weight, problem.factors_of(path), generator)
                learned.load_state_dict(scores[path])
                return learned.values_t(weight.t()).t()

        def search(order: SharedOrder) -> Search:
            @cache
            def largest() -> Tensor:
                return torch.stack([score_of(path).max() for group in order.groups for path in group.members]).max()

            # As the saliency, whose logarithm scores started at. A factor that all linears of the order have in common moves
            # nothing; without it scores of 90 would be infinite.
            return search_of(order, lambda path: (score_of(path) - largest()).exp(), problem.pattern, _shared(order, present))

        shared = orders_within(shared_orders(problem.groups, permutation.constraint), window.first, window.stop)
        return expanded(shared, searched([search(order) for order in shared], problem.device, "permutation"))

    def _start(self, problem: LearningProblem, window: Window, scores: ScoresOf) -> ScoresAt:
        """What the linears of a window start from: scores, where there are some, else the pruner's."""
        generator = torch.Generator().manual_seed(problem.seed + 1 + window.number)

        def start(path: str, weight: Tensor, factors: SaliencyFactors, order: Tensor | None = None) -> Scores:
            made = self.scores(weight, factors, generator)
            if path in scores:
                places = torch.arange(weight.shape[1], device=weight.device) if order is None else order
                values = {n: v[places] if n in made.by_channel else v for n, v in scores[path].items()}
                made.load_state_dict(values)
            return made

        return start

    def _learners(
        self, problem: LearningProblem, window: Window, found: _Found, start: ScoresAt, permutation: Any
    ) -> AbstractContextManager[list[Learner]]:
        """What learns in a window, whose linears are masked linears meanwhile; the masks are the last of it."""
        if self.learns_orders:
            shared = shared_orders(problem.groups, permutation.constraint)
            if orders_within(shared, window.first, window.stop):
                return self._with_orders(problem, window, found, start, permutation, shared)
        # Else these layers share their orders with others, and keep them.
        return self._in_orders(problem, window, found, start)

    @contextmanager
    def _in_orders(self, problem: LearningProblem, window: Window, found: _Found, start: ScoresAt) -> Iterator[list[Learner]]:
        """Masks in orders that are fixed."""
        groups = [group for group in problem.groups if group.layer in window]
        placement = placement_of(problem.model)
        kernels = chosen_kernels(self, problem, groups, self._steps(problem), None, dense=True)
        with ordered_linears(problem, groups, found.present, start, kernels) as linears:

            def mask_of(group: ChannelGroup, linear: OrderedMaskedLinear) -> Tensor:
                with placement.layer(group.layer):
                    return linear.mask()

            yield [MaskLearner(groups, linears, mask_of, self.learning_rate, *found.before_window())]

    @contextmanager
    def _with_orders(
        self,
        problem: LearningProblem,
        window: Window,
        found: _Found,
        start: ScoresAt,
        lcp: LCP,
        shared: list[SharedOrder],
    ) -> Iterator[list[Learner]]:
        """Orders, and masks in them as they learn."""
        groups = [group for group in problem.groups if group.layer in window]
        placement = placement_of(problem.model)
        orders = {order.name: _shared(order, found.present) for order in shared}
        learning = orders_within(shared, window.first, window.stop)
        logits = lcp.start_logits(problem, learning, orders, near=lcp.init == "heuristic" or window.round > 0)
        kernels = chosen_kernels(self, problem, groups, self._steps(problem), lcp.straight_through, dense=True)
        used_by = {group.name: order for order, group in members(shared, window)}

        def scores_at(path: str) -> Scores:
            return start(path, linear_at(problem.model, path).weight, problem.factors_of(path))

        with masked_linears(problem, lcp.places(shared, window), scores_at, lcp.straight_through, kernels) as linears:
            of_orders = OrderLearner(lcp, problem, shared, window, orders, logits, linears)

            def mask_of(group: ChannelGroup, linear: PermutedMaskedLinear) -> Tensor:
                order = used_by[group.name]
                present = of_orders.present[order.name] if order.name in logits else of_orders.fixed[order.name]
                with placement.layer(group.layer):
                    return linear.mask(order.expand(present))

            of_masks = MaskLearner(groups, linears, mask_of, self.learning_rate, *found.before_window())
            if self.orders == "turns":
                of_orders.turn, of_masks.turn = 0, 1
            yield [of_orders, of_masks]

    def _steps(self, problem: LearningProblem) -> int:
        """How many steps a window has in all of its rounds."""
        return self.rounds * steps_of(self, samples_of(self, problem))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in tensors.items()}


def _shared(order: SharedOrder, orders: Mapping[str, Tensor]) -> Tensor:
    """The shared order behind those of its groups, which are of the same constraint."""
    found = order.shared(orders[order.groups[0].name])
    assert found is not None
    return found


def _check(state: Checkpoint) -> None:
    """Raise DataError where a checkpoint is not one of masks."""
    MaskLearner.check(state["learners"][-1] if state["learners"] else {})
