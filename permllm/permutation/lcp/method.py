"""Learnable channel permutation (PermLLM, section 4): the settings, the start, and the windows of layers in turn.

All logits of a window of decoder layers learn together, end to end, against the dense model's output of the window's last
layer. The weights stay as they are. Forward uses hard permutations and hard masks; backward goes through the soft ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from permllm.calibration.statistics import NormOver
from permllm.errors import ConfigError
from permllm.models.decoder import LayerStream
from permllm.models.families import decoder_layers, linear_at
from permllm.models.losses import LOSSES
from permllm.permutation.heuristic import search_order
from permllm.permutation.lcp.blocks import BlockLogits
from permllm.permutation.lcp.kernels import EAGER, Kernels, KernelUse, compiled_kernels
from permllm.permutation.lcp.masked_linear import StraightThrough
from permllm.permutation.lcp.sinkhorn import SinkhornStart
from permllm.permutation.lcp.training import Training, Window, masked_linears, read_checkpoint
from permllm.permutation.problem import LearningProblem
from permllm.permutation.shared import Constraint, SharedOrder, check_constraint, expanded, shared_orders
from permllm.runtime import parallel
from permllm.runtime.precision import product_dtype
from permllm.sparsity import permuted_nm_mask
from permllm.validation import check_number, check_one_of, check_whole

# Weights times steps. Compiling takes 10 to 20 s and saves some 100 ns a weight and step on two cores.
_COMPILE_FROM = 4e8


@dataclass
class LCP:
    """Settings of learnable channel permutation.

    Args:
        block_size: B, channels that are permuted among themselves.
        temperature: schedule, from progress in [0, 1] to the Sinkhorn temperature.
        constraint: `free`, an order for each channel group; `foldable`, only what neighbouring weights can absorb (see
            `permllm.permutation.shared`). An order that several groups share learns only in a window that holds all of them,
            and otherwise stays where it starts.
        init: `heuristic` starts at RIA's order with logits close to the assignment boundary (`margin` on the identity plus
            `noise`); `random` is the paper's start: identity order, logits uniform in +-1/sqrt(B) times a learned scale that
            starts at sqrt(B), clamped to +-1 with a gradient that passes.
        temperature_every: how often the temperature changes: each `step`, from 0 to 1 of progress, or each `pass`, by the
            share of the passes before it, which never is 1 (the paper's released code).
        sinkhorn_iterations: L; 0 leaves what they start from.
        sinkhorn_start: `exponential` of the logits over the temperature, or `softmax` of their rows (the paper's released
            code); what differs is L = 0.
        norm_over: what the mean square of the inputs in the pruner's saliency is a mean over: `tokens`, or `samples` (the
            paper's released code), which makes every norm larger by the root of a sample's length. The masks are the same,
            and the softmax over each group is sharper where the saliency is not normalised.
        learning_rate: of AdamW, with a cosine schedule to zero over all steps.
        weight_decay: of AdamW.
        passes: over the calibration samples.
        rounds: how often the passes are gone through, schedules and all, each time from the best order so far with its groups
            of M dealt anew to the blocks. The mask is the same, and channels meet others than before.
        batch_size: samples a step.
        loss: `kl` of the next-token distributions, which needs `window=model`; `cosine` of the window's output (the paper), or
            `mse` of it. None is `kl` where the whole model learns together, else `cosine`.
        window: what learns together: `model`, a number of consecutive decoder layers, or `layer`. Windows learn in turn, each
            on the inputs that the pruned layers before give it, against its own dense output.
        straight_through: `swap`, `hard` or `soft`, see `permllm.permutation.lcp.masked_linear`.
        last_layers: learn only the last so many decoder layers, the others get the heuristic order; None learns all.
        normalize_saliency: divide each linear's saliency by its mean before the group softmax.
        gumbel: Gumbel noise on the logits over the temperature in each step (Mena et al. 2018), times this; 0 is none.
        margin: logit of the start order over the others (`init=heuristic`).
        noise: half width of the uniform noise on the logits (`init=heuristic`).
        select_from: after each of the last so many passes the loss of all samples is measured with the order as it then is,
            and the best of these orders is the result; 1 takes the last. Losses during a pass do not tell: each step has its
            own order and its own samples.
        activation_checkpointing: recompute each decoder layer in backward; None decides by the size of the activations.
        compile: compile the elementwise work of the masked linears, which takes 10 to 20 seconds; None does it where that
            is soon made up for. Without a compiler the step is the slower one.
    """

    block_size: int
    temperature: Callable[[float], float]
    constraint: Constraint = "free"
    init: str = "heuristic"
    temperature_every: str = "step"
    sinkhorn_iterations: int = 5
    sinkhorn_start: SinkhornStart = "exponential"
    norm_over: NormOver = "tokens"
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    passes: int = 3
    rounds: int = 1
    batch_size: int = 4
    loss: str | None = None
    window: int | str = "model"
    straight_through: StraightThrough = "swap"
    last_layers: int | None = None
    normalize_saliency: bool = True
    gumbel: float = 0.0
    margin: float = 0.05
    noise: float = 0.02
    select_from: int = 2
    activation_checkpointing: bool | None = None
    compile: bool | None = None
    learned = True
    local = False

    def __post_init__(self) -> None:
        check_constraint(self.constraint)
        check_one_of("permutation.init", self.init, ("heuristic", "random"))
        if self.loss is None:
            self.loss = "kl" if self.window == "model" else "cosine"
        check_one_of("permutation.loss", self.loss, LOSSES)
        if self.window not in ("model", "layer"):
            if not isinstance(self.window, int):
                raise ConfigError(
                    f"permutation.window={self.window!r} is not valid; valid are: model, layer, a number of layers"
                )
            check_whole("permutation.window", self.window, 1)
        if self.loss == "kl" and self.window != "model":
            raise ConfigError("permutation.loss=kl needs permutation.window=model: only the last layer has next-token logits")
        check_one_of("permutation.straight_through", self.straight_through, get_args(StraightThrough))
        check_one_of("permutation.temperature_every", self.temperature_every, ("step", "pass"))
        check_whole("permutation.sinkhorn_iterations", self.sinkhorn_iterations, 0)
        check_one_of("permutation.sinkhorn_start", self.sinkhorn_start, get_args(SinkhornStart))
        check_one_of("permutation.norm_over", self.norm_over, get_args(NormOver))
        for name in ("passes", "rounds", "batch_size", "select_from"):
            check_whole(f"permutation.{name}", getattr(self, name), 1)
        check_number("permutation.learning_rate", self.learning_rate, positive=True)
        for name in ("weight_decay", "gumbel", "margin", "noise"):
            check_number(f"permutation.{name}", getattr(self, name), positive=False)
        if self.last_layers is not None:
            check_whole("permutation.last_layers", self.last_layers, 1)

    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Learn the orders of all channel groups.

        Returns:
            int64 `(C_in,)` on the CPU by group: the best order of the last passes (`select_from`).

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

    @staticmethod
    def learning(shared: list[SharedOrder], first: int, stop: int) -> list[SharedOrder]:
        """The orders that learn in the window of the layers from `first` to before `stop`: those it holds all groups of."""
        return [order for order in shared if first <= order.layers.start and order.layers.stop <= stop]

    def spans(self, layers: int) -> list[tuple[int, int]]:
        """First layer and the one after the last of each window, for a model of so many decoder layers."""
        first = max(0, layers - self.last_layers) if self.last_layers is not None else 0
        size = self.window if isinstance(self.window, int) else {"model": layers, "layer": 1}[self.window]
        return [(start, min(start + size, layers)) for start in range(first, layers, size)]

    def kernels(self, problem: LearningProblem, learning: list[SharedOrder]) -> Kernels:
        """The kernels for the elementwise work of the masked linears."""
        wanted = self.compile
        if wanted is None:
            steps = self.rounds * self.passes * math.ceil(len(problem.tokens) / self.batch_size)
            groups = [group for order in learning for group in order.groups]
            wanted = steps * sum(group.channels * sum(group.rows) for group in groups) > _COMPILE_FROM
        if not wanted:
            return EAGER
        path = problem.groups[0].members[0]
        weight = linear_at(problem.model, path).weight
        row = problem.factors[path].row is not None
        use = KernelUse(weight.device.type, self.straight_through, problem.pattern, weight.dtype, product_dtype(weight), row)
        return compiled_kernels(use) or EAGER

    def start_orders(self, problem: LearningProblem, shared: list[SharedOrder], first: int) -> dict[str, Tensor]:
        """Where learning starts from, layers before `first` keeping it; int64 on the CPU by shared order."""
        orders = {}
        for order in tqdm(shared, desc="start order", unit="order"):
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
