"""The learning of masks, whatever their scores are: windows of layers in turn, in orders that are fixed or learn with them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from permllm.calibration.saliency import SaliencyFactors
from permllm.calibration.statistics.base import Statistics
from permllm.config import WITH_ORDERS
from permllm.learning.kernels import chosen_kernels
from permllm.learning.masked_linear import PermutedMaskedLinear, masked_linears
from permllm.learning.ordered_linear import OrderedMaskedLinear, ordered_linears
from permllm.learning.problem import LearningProblem
from permllm.learning.scores import FreeScores, Scores
from permllm.learning.training import Checkpoint, Learner, Training, Window, read_checkpoint, samples_of, steps_of
from permllm.learning.windows import WindowStream
from permllm.mask.contract import FoundMasks, MaskPlan
from permllm.mask.learner import MaskLearner
from permllm.mask.refined import Refining
from permllm.mask.settings import MaskSettings
from permllm.mask.weights import MaskedWeightLearner
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.placement import placement_of
from permllm.permutation.heuristic import search_order
from permllm.permutation.lcp.learner import OrderLearner, members
from permllm.permutation.lcp.method import LCP
from permllm.permutation.shared import SharedOrder, expanded, orders_within, shared_orders
from permllm.record.names import MASK_CHECKPOINT
from permllm.runtime import parallel
from permllm.sparsity import PackedMasks, permuted_nm_mask, unpacked_mask

ScoresOf: TypeAlias = dict[str, dict[str, Tensor]]
"""Parameters of scores by the path of a linear and their name, channels in the dense model's order."""


class MaskLearning(MaskSettings):
    """What the methods share; what they choose masks by is theirs."""

    learned = True
    local = False
    kind: ClassVar[type[Scores]]

    @property
    def statistics(self) -> Statistics:
        """Of what the linears read, for the masks that learning starts from."""
        return ()

    @property
    def learns_orders(self) -> bool:
        """The orders learn with the masks, by descent."""
        return self.orders in WITH_ORDERS

    @property
    def learns_weights(self) -> bool:
        """The weights under the masks learn with them."""
        return self.weights_learning_rate is not None

    @abstractmethod
    def scores(self, weight: Tensor, factors: SaliencyFactors, generator: torch.Generator) -> Scores:
        """What the mask of a linear is chosen by, from its weight `(C_out, C_in)`; it starts at the pruner's mask."""

    @abstractmethod
    def count(self, group: ChannelGroup) -> int:
        """Parameters of the linears of a group."""

    def refining(self, problem: LearningProblem) -> Refining | None:
        """What makes the masks that learning starts from; None where it is the pruner."""
        return None

    def plan(self, groups: list[ChannelGroup], layers: int) -> MaskPlan:
        """What learns on a model of these groups and so many decoder layers."""
        parameters: dict[int, int] = {}
        for group in groups:
            parameters[group.layer] = parameters.get(group.layer, 0) + self.count(group)
        return MaskPlan(self.spans(layers), parameters, self.kind.keeps_masked, self.learns_weights)

    def masks(self, problem: LearningProblem, orders: Mapping[str, Tensor], permutation: Any = None) -> FoundMasks:
        """Learn the masks of all linears; as `permllm.mask.contract.LearnedMask`.

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is not.
        """
        state = parallel.from_first(lambda: read_checkpoint(problem, MASK_CHECKPOINT, _check))
        problem.on_resume([] if state is None else state["passes"])
        passes = [] if state is None else list(state["passes"])
        begin = 0 if state is None else state["window"]
        learned: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        present = dict(orders)
        if state is not None:
            of_masks = state["learners"][-1]
            learned = {path: bits.cpu() for path, bits in of_masks["earlier"].items()}
            present |= {name: order.cpu() for name, order in of_masks["orders"].items()}
        best = dict(present)
        if state is not None:
            best |= {name: order.cpu() for name, order in state["learners"][-1]["orders_of_earlier"].items()}

        def mask_of(group: ChannelGroup, path: str) -> Tensor:
            if path in learned:
                return unpacked_mask(learned[path], linear_at(problem.model, path).weight.shape)
            order = best[group.name].to(problem.device)
            return permuted_nm_mask(problem.saliency_of(path), order, problem.pattern_of(group))

        stream, refining = WindowStream(problem), self.refining(problem)
        spans = self.spans(len(decoder_layers(problem.model)))
        scores: ScoresOf = {}
        best_loss = math.inf
        for number, (first, stop) in enumerate(span for span in spans for _ in range(self.rounds)):
            if number < begin or not any(first <= group.layer < stop for group in problem.groups):
                continue
            round_ = number % self.rounds
            scores, best_loss = (scores, best_loss) if round_ else ({}, math.inf)
            if scores and self.orders == "searched":
                search = partial(self._searched, problem, permutation, scores, present, (first, stop))
                present |= parallel.from_first(search)
            window = Window(number, round_, first, stop, stream.inputs(first, mask_of), stream.target(stop))
            lcp = permutation if self.learns_orders else None
            start: dict[str, Tensor] = {}
            if refining is not None and not scores and not (state is not None and number == begin):
                of_window = [group for group in problem.groups if group.layer in window]
                start = parallel.from_first(partial(refining.packed, of_window, present))
            with self._learners(problem, window, (present, best), learned, scores, start, lcp) as learners:
                scores.clear()  # the learners have them
                training = Training(self, problem, window, learners, "mask", MASK_CHECKPOINT, best_loss, passes)
                if state is not None and number == begin:
                    training.restore(state)
                    state = None  # which is as large as what learns
                training.run()
                best_loss = training.best_loss
                scores = self._take(learners, present, best, learned, weights, again=round_ + 1 < self.rounds)
                del training, learners  # before those of the next window, which are as large
        masks = PackedMasks((path, mask_of(group, path).cpu()) for group in problem.groups for path in group.members)
        return FoundMasks(best, masks, weights)

    @staticmethod
    def _take(
        learners: list[Learner],
        present: dict[str, Tensor],
        best: dict[str, Tensor],
        learned: dict[str, Tensor],
        weights: dict[str, Tensor],
        again: bool,
    ) -> ScoresOf:
        """Have the orders, weights and masks that a window has learned; the scores, where it learns again."""
        *others, masks = learners
        assert isinstance(masks, MaskLearner)
        for learner in others:
            if isinstance(learner, MaskedWeightLearner):
                weights |= learner.best
            else:
                assert isinstance(learner, OrderLearner)
                present |= expanded(learner.shared, learner.best)
        if masks.best:
            learned |= masks.best
            # Of earlier windows a searched order may be present that is not the one that their masks are N:M in.
            best |= {group.name: present[group.name] for group in masks.groups}
        return masks.scores_of_the_dense_order() if again else {}

    def _searched(
        self,
        problem: LearningProblem,
        permutation: Any,
        scores: ScoresOf,
        present: Mapping[str, Tensor],
        span: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Orders by group that retain the most of what masks have learned, where that is more than the present ones do.

        They are those that the layers of a span have all groups of.
        """

        def score_of(path: str) -> Tensor:
            with placement_of(problem.model).layer_of(path):
                weight, generator = linear_at(problem.model, path).weight, torch.Generator()
                learned = self.scores(weight, problem.factors_of(path), generator)
                learned.load_state_dict(scores[path])
                return learned.values_t(weight.t()).t()

        def search(order: SharedOrder) -> Tensor:
            # As the saliency, whose logarithm scores started at. A factor that all linears of the order have in common moves
            # nothing; without it scores of 90 would be infinite.
            largest = max(score_of(path).max() for group in order.groups for path in group.members)
            return search_order(order, lambda path: (score_of(path) - largest).exp(), problem.pattern, _shared(order, present))

        shared = orders_within(shared_orders(problem.groups, permutation.constraint), *span)
        return expanded(shared, {order.name: search(order) for order in tqdm(shared, desc="permutation")})

    @contextmanager
    def _learners(
        self,
        problem: LearningProblem,
        window: Window,
        orders_and_best: tuple[dict[str, Tensor], dict[str, Tensor]],
        earlier: Mapping[str, Tensor],
        scores: ScoresOf,
        refined: Mapping[str, Tensor],
        lcp: LCP | None,
    ) -> Iterator[list[Learner]]:
        """What learns in a window, whose linears are masked linears meanwhile: orders or weights, and after them the masks.

        They start from scores, where there are some, else from refined masks, else from those of the pruner.
        """
        orders, placement = orders_and_best[0], placement_of(problem.model)
        groups = [group for group in problem.groups if group.layer in window]
        generator = torch.Generator().manual_seed(problem.seed + 1 + window.number)
        group_of = {path: group for group in groups for path in group.members}

        def scores_of(path: str, weight: Tensor, factors: SaliencyFactors, order: Tensor | None = None) -> Scores:
            made = self.scores(weight, factors, generator)
            if path in scores:
                order_ = torch.arange(weight.shape[1], device=weight.device) if order is None else order
                values = {n: v[order_] if n in made.by_channel else v for n, v in scores[path].items()}
                made.load_state_dict(values)
            elif path in refined:
                assert isinstance(made, FreeScores)
                keep_t = unpacked_mask(refined[path], weight.shape).to(weight.device).t()
                m = problem.pattern_of(group_of[path]).m
                if order is None:
                    made.start_at(keep_t, m, orders[group_of[path].name].to(weight.device))
                else:
                    made.start_at(keep_t[order], m)
            return made

        def scores_at(path: str) -> Scores:
            return scores_of(path, linear_at(problem.model, path).weight, problem.factors_of(path))

        steps = self.rounds * steps_of(self, samples_of(self, problem))
        rate = self.learning_rate
        shared = [] if lcp is None else shared_orders(problem.groups, lcp.constraint)
        learning = orders_within(shared, window.first, window.stop)
        if lcp is None or not learning:  # these layers share their orders with others, and keep them
            kernels = chosen_kernels(self, problem, groups, steps, None, dense=True)
            with ordered_linears(problem, groups, orders, scores_of, kernels, self.learns_weights) as ordered:

                def fixed_mask(group: ChannelGroup, linear: OrderedMaskedLinear) -> Tensor:
                    with placement.layer(group.layer):
                        return linear.mask()

                of_weights: list[Learner] = []
                if self.weights_learning_rate is not None:
                    each = (zip(group.members, ordered[group.name], strict=True) for group in groups)
                    of_weights = [MaskedWeightLearner(dict(chain.from_iterable(each)), self.weights_learning_rate)]
                yield [*of_weights, MaskLearner(groups, ordered, fixed_mask, rate, earlier, *orders_and_best)]
            return
        start = {order.name: _shared(order, orders) for order in shared}
        logits = lcp.start_logits(problem, learning, start, near=lcp.init == "heuristic" or window.round > 0)
        kernels = chosen_kernels(self, problem, groups, steps, lcp.straight_through, dense=True)
        used_by = {group.name: order for order, group in members(shared, window)}
        with masked_linears(problem, lcp.places(shared, window), scores_at, lcp.straight_through, kernels) as linears:
            of_orders = OrderLearner(lcp, problem, shared, window, start, logits, linears)

            def mask_of(group: ChannelGroup, linear: PermutedMaskedLinear) -> Tensor:
                order = used_by[group.name]
                present = of_orders.present[order.name] if order.name in logits else of_orders.fixed[order.name]
                with placement.layer(group.layer):
                    return linear.mask(order.expand(present))

            of_masks = MaskLearner(groups, linears, mask_of, rate, earlier, *orders_and_best)
            if self.orders == "turns":
                of_orders.turn, of_masks.turn = 0, 1
            yield [of_orders, of_masks]


def _shared(order: SharedOrder, orders: Mapping[str, Tensor]) -> Tensor:
    """The shared order behind those of its groups, which are of the same constraint."""
    found = order.shared(orders[order.groups[0].name])
    assert found is not None
    return found


def _check(state: Checkpoint) -> None:
    """Raise DataError where a checkpoint is not one of masks."""
    MaskLearner.check(state["learners"][-1] if state["learners"] else {})
    for other in state["learners"][:-1]:
        if "values" in other:
            MaskedWeightLearner.check(other)
