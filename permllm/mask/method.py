"""The learning of masks, whatever their scores are: windows of layers in turn, in orders that are fixed or learn with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from permllm.calibration.saliency import SaliencyFactors
from permllm.learning.kernels import chosen_kernels
from permllm.learning.masked_linear import PermutedMaskedLinear, masked_linears
from permllm.learning.ordered_linear import ordered_linears
from permllm.learning.problem import LearningProblem
from permllm.learning.scores import Scores
from permllm.learning.training import Checkpoint, Learner, Training, Window, read_checkpoint, samples_of, steps_of
from permllm.learning.windows import WindowStream
from permllm.mask.contract import MaskPlan
from permllm.mask.learner import MaskLearner
from permllm.mask.settings import ScoreSettings
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.permutation.lcp.learner import OrderLearner, members
from permllm.permutation.lcp.method import LCP
from permllm.permutation.shared import SharedOrder, expanded, shared_orders
from permllm.record.names import MASK_CHECKPOINT
from permllm.runtime import parallel
from permllm.sparsity import permuted_nm_mask, unpacked_mask


class MaskLearning(ScoreSettings):
    """What the methods share; what they choose masks by is theirs."""

    learned = True

    @property
    def learns_orders(self) -> bool:
        """The orders learn with the masks."""
        return self.orders != "fixed"

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
        return MaskPlan(self.spans(layers), parameters)

    def masks(
        self, problem: LearningProblem, orders: Mapping[str, Tensor], permutation: Any = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Learn the masks of all linears; as `permllm.mask.contract.LearnedMask`.

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is not.
        """
        state = parallel.from_first(lambda: read_checkpoint(problem, MASK_CHECKPOINT, _check))
        problem.on_resume([] if state is None else state["passes"])
        passes = [] if state is None else list(state["passes"])
        begin = 0 if state is None else state["window"]
        learned: dict[str, Tensor] = {}
        if state is not None:
            learned = {path: bits.cpu() for path, bits in state["learners"][-1]["earlier"].items()}
        lcp = permutation if self.learns_orders else None
        found = dict(orders)

        def mask_of(group: ChannelGroup, path: str) -> Tensor:
            if path in learned:
                return unpacked_mask(learned[path], linear_at(problem.model, path).weight.shape)
            return permuted_nm_mask(problem.saliency_of(path), order_of(group.name), problem.pattern_of(group))

        def order_of(name: str) -> Tensor:
            return found[name].to(problem.device)

        stream = WindowStream(problem)
        for number, (first, stop) in enumerate(self.spans(len(decoder_layers(problem.model)))):
            if number < begin or not any(first <= group.layer < stop for group in problem.groups):
                continue
            window = Window(number, 0, first, stop, stream.inputs(first, mask_of), stream.target(stop))
            with self._learners(problem, window, found, learned, lcp) as learners:
                training = Training(self, problem, window, learners, "mask", MASK_CHECKPOINT, passes=passes)
                if state is not None and number == begin:
                    training.restore(state)
                training.run()
                for learner in learners:
                    if isinstance(learner, OrderLearner):
                        found |= expanded(learner.shared, learner.best)
                    elif isinstance(learner, MaskLearner):
                        learned |= learner.best
        return found, {path: mask_of(group, path).cpu() for group in problem.groups for path in group.members}

    @contextmanager
    def _learners(
        self,
        problem: LearningProblem,
        window: Window,
        orders: Mapping[str, Tensor],
        earlier: Mapping[str, Tensor],
        lcp: LCP | None,
    ) -> Iterator[list[Learner]]:
        """What learns in a window, whose linears are masked linears meanwhile: the masks, and the orders before them."""
        groups = [group for group in problem.groups if group.layer in window]
        generator = torch.Generator().manual_seed(problem.seed + 1 + window.number)

        def scores_of(weight: Tensor, factors: SaliencyFactors) -> Scores:
            return self.scores(weight, factors, generator)

        def scores_at(path: str) -> Scores:
            return scores_of(linear_at(problem.model, path).weight, problem.factors_of(path))

        steps = steps_of(self, samples_of(self, problem))
        rate = self.learning_rate
        if lcp is None:
            kernels = chosen_kernels(self, problem, groups, steps, None, dense=True)
            with ordered_linears(problem, groups, orders, scores_of, kernels) as ordered:
                yield [MaskLearner(groups, ordered, lambda _, linear: linear.mask(), rate, earlier)]
            return
        shared = shared_orders(problem.groups, lcp.constraint)
        start = {order.name: _shared(order, orders) for order in shared}
        learning = lcp.learning(shared, window.first, window.stop)
        logits = lcp.start_logits(problem, learning, start, near=lcp.init == "heuristic")
        kernels = chosen_kernels(self, problem, groups, steps, lcp.straight_through, dense=True)
        used_by = {group.name: order for order, group in members(shared, window)}
        with masked_linears(problem, lcp.places(shared, window), scores_at, lcp.straight_through, kernels) as linears:
            of_orders = OrderLearner(lcp, problem, shared, window, start, logits, linears)

            def mask_of(group: ChannelGroup, linear: PermutedMaskedLinear) -> Tensor:
                order = used_by[group.name]
                present = of_orders.present[order.name] if order.name in logits else of_orders.fixed[order.name]
                return linear.mask(order.expand(present))

            of_masks = MaskLearner(groups, linears, mask_of, rate, earlier)
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
