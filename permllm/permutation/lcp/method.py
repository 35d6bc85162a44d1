"""Learnable channel permutation (PermLLM, section 4): the settings, the start, and the windows of layers in turn.

All logits of a window of decoder layers learn together, end to end, against the dense model's output of the window's last
layer. The weights stay as they are. Forward uses hard permutations and hard masks; backward goes through the soft ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from permllm.learning.kernels import EAGER, Kernels, KernelUse, compiled_kernels
from permllm.learning.problem import LearningProblem
from permllm.learning.stacks import count_logits
from permllm.models.decoder import LayerStream
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.permutation.contract import LearningPlan
from permllm.permutation.heuristic import search_order
from permllm.permutation.lcp.blocks import BlockLogits
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.lcp.training import Training, Window, masked_linears, read_checkpoint
from permllm.permutation.shared import SharedOrder, expanded, shared_orders
from permllm.runtime import parallel
from permllm.runtime.precision import product_dtype
from permllm.sparsity import permuted_nm_mask

# Weights times steps. Compiling takes 10 to 20 s and saves some 100 ns a weight and step on two cores.
_COMPILE_FROM = 4e8


class LCP(LCPSettings):
    """The method; its settings are those of `LCPSettings`."""

    def plan(self, groups: list[ChannelGroup], layers: int) -> LearningPlan:
        """What learns on a model of these channel groups and so many decoder layers."""
        shared = shared_orders(groups, self.constraint)
        spans = self.spans(layers)
        learning = [order for first, stop in spans for order in self.learning(shared, first, stop)]
        blocks, sizes = {}, {}
        for order in shared:
            stacks = order.stacks(self.block_size)
            repeated = len(order.groups) > 1 or order.repeats > 1
            for group in order.groups:
                blocks[group.name] = f"{sum(stack.count for stack in stacks)} of at most {max(stack.size for stack in stacks)}"
                sizes[group.name] = str(count_logits(stacks)) + (f", shared as {_sharing(order)}" if repeated else "")
        logits = sum(count_logits(order.stacks(self.block_size)) for order in learning)
        scales = len(learning) if self.init == "random" else 0
        stays = [order.name for order in shared if order not in learning and len(order.groups) > 1]
        return LearningPlan(spans, blocks, sizes, logits, logits + scales, stays)

    @staticmethod
    def learning(shared: list[SharedOrder], first: int, stop: int) -> list[SharedOrder]:
        """The orders that learn in the stage of the layers from `first` to before `stop`: those it holds all groups of."""
        return [order for order in shared if first <= order.layers.start and order.layers.stop <= stop]

    def spans(self, layers: int) -> list[tuple[int, int]]:
        """First layer and the one after the last of each stage, for a model of so many decoder layers."""
        first = max(0, layers - self.last_layers) if self.last_layers is not None else 0
        size = self.layers_per_stage if isinstance(self.layers_per_stage, int) else layers
        return [(start, min(start + size, layers)) for start in range(first, layers, size)]

    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Learn the orders of all channel groups.

        Returns:
            int64 `(C_in,)` on the CPU by group: the best order of the last epochs (`select_from`).

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is not, and where the best
                order so far is kept.
        """
        spans = self.spans(len(decoder_layers(problem.model)))
        shared = shared_orders(problem.groups, self.constraint)
        # Another GPU, or a folder without the checkpoint, must not let a process learn from elsewhere than the others.
        orders = parallel.from_first(lambda: self.start_orders(problem, shared, spans[0][0]))
        state = parallel.from_first(lambda: read_checkpoint(problem))
        problem.on_resume([] if state is None else state["passes"])
        passes = [] if state is None else list(state["passes"])
        begin = 0 if state is None else state["window"]
        if state is not None:
            orders |= {name: order.cpu() for name, order in state["best"].items()}
        stream = WindowStream(problem, shared)
        best_loss = math.inf
        for number, (first, stop) in enumerate(span for span in spans for _ in range(self.rounds)):
            learning = self.learning(shared, first, stop)
            if number < begin or not learning:
                continue
            round_ = number % self.rounds
            if round_:
                generator = torch.Generator().manual_seed(problem.seed + 2 + number)
                orders |= {order.name: order.deal(orders[order.name], problem.pattern, generator) for order in learning}
            present = [order for order in shared if any(first <= group.layer < stop for group in order.groups)]
            window = Window(number, round_, first, stop, present, learning, stream.inputs(first, orders), stream.target(stop))
            logits = self.start_logits(problem, learning, orders, near=self.init == "heuristic" or round_ > 0)
            kernels = self.kernels(problem, learning)
            with masked_linears(self, problem, window, kernels) as linears:
                start_loss = best_loss if round_ else math.inf
                training = Training(self, problem, shared, window, orders, logits, linears, start_loss, passes)
                if state is not None and number == begin:
                    training.restore(state)
                orders = training.run()
                best_loss = training.best_loss
        return expanded(shared, orders)

    def kernels(self, problem: LearningProblem, learning: list[SharedOrder]) -> Kernels:
        """The kernels for the elementwise work of the masked linears."""
        wanted = self.compile
        if wanted is None:
            steps = self.rounds * self.epochs * math.ceil(len(problem.tokens) / self.batch_size)
            groups = [group for order in learning for group in order.groups]
            wanted = steps * sum(group.channels * sum(group.rows) for group in groups) > _COMPILE_FROM
        if not wanted:
            return EAGER
        path = problem.groups[0].members[0]
        weight = linear_at(problem.model, path).weight
        factors = problem.factors[path]
        use = KernelUse(
            weight.device.type,
            self.straight_through,
            problem.pattern,
            weight.dtype,
            product_dtype(weight),
            row=factors.row is not None,
            dense=factors.dense,
        )
        return compiled_kernels(use) or EAGER

    def start_orders(self, problem: LearningProblem, shared: list[SharedOrder], first: int) -> dict[str, Tensor]:
        """Where learning starts from, layers before `first` keeping it; int64 on the CPU by shared order."""
        orders = {}
        for order in tqdm(shared, desc="start permutation", unit="permutation"):
            if self.init == "random" and order.layers.start >= first:
                orders[order.name] = torch.arange(order.channels)
            else:
                orders[order.name] = search_order(order, problem.saliency_of, problem.pattern)
        return orders

    def start_logits(
        self, problem: LearningProblem, learning: list[SharedOrder], orders: dict[str, Tensor], near: bool
    ) -> dict[str, BlockLogits]:
        """The logits of each order at the start, on the model's device: near the given orders, or the paper's random ones."""
        generator = torch.Generator().manual_seed(problem.seed)
        dtype = torch.promote_types(next(problem.model.parameters()).dtype, torch.float32)
        logits = {}
        for order in learning:
            stacks, start = order.stacks(self.block_size), []
            for stack in stacks:
                uniform = torch.rand(stack.count, stack.size, stack.size, generator=generator) * 2 - 1
                if near:
                    start.append(self.margin * torch.eye(stack.size) + self.noise * uniform)
                else:
                    start.append(uniform / math.sqrt(self.block_size))
            scale = None if near else math.sqrt(self.block_size)
            logits[order.name] = BlockLogits(orders[order.name], stacks, start, scale).to(problem.device, dtype)
        return logits


class WindowStream:
    """Inputs and targets of the windows: two streams of hidden states, through the dense and through the pruned layers.

    Where all layers learn together neither is needed: the inputs are the embeddings, and the target is known.
    """

    def __init__(self, problem: LearningProblem, shared: list[SharedOrder]) -> None:
        self.problem = problem
        self._shared = shared
        self._layers = len(decoder_layers(problem.model))
        self._dense: tuple[LayerStream, int] | None = None
        self._pruned: tuple[LayerStream, int] | None = None

    def inputs(self, first: int, orders: dict[str, Tensor]) -> Tensor | None:
        """Inputs of layer `first` when the layers before it are pruned in these orders, `(samples, tokens, hidden)`.

        Args:
            first: index of a decoder layer.
            orders: by shared order.
        """
        if first == 0:
            return None
        orders = expanded(self._shared, orders)
        stream, position = self._pruned or (self._new(), 0)
        for index in range(position, first):
            dense = self._prune_layer(index, orders)
            stream.advance(index)
            for path, weight in dense.items():
                linear_at(self.problem.model, path).weight.data = weight
        self._pruned = (stream, first)
        return stream.states()

    def target(self, stop: int) -> Tensor:
        """Dense output of layer `stop - 1`, `(samples, tokens, hidden)`."""
        if stop == self._layers:
            return self.problem.target
        stream, position = self._dense or (self._new(), 0)
        for index in range(position, stop):
            stream.advance(index)
        self._dense = (stream, stop)
        return stream.states()

    def _new(self) -> LayerStream:
        return LayerStream(self.problem.model, self.problem.tokens, self.problem.calibration_batch_size)

    def _prune_layer(self, index: int, orders: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mask the linears of a layer in these orders of its groups; their dense weights by path, to be put back."""
        dense = {}
        for group in (group for group in self.problem.groups if group.layer == index):
            for path in group.members:
                weight = linear_at(self.problem.model, path).weight
                score = self.problem.saliency_of(path)
                mask = permuted_nm_mask(score, orders[group.name].to(score.device), self.problem.pattern)
                dense[path] = weight.data
                weight.data = torch.where(mask, weight.data, 0.0)
        return dense


def _sharing(order: SharedOrder) -> str:
    if len(order.groups) > 1:
        return order.name
    return f"{order.channels // order.segment} heads of {order.segment}, each {order.repeats} times"
