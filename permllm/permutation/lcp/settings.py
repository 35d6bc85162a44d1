"""The settings of learnable channel permutation, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from permllm.calibration.statistics.base import NormOver
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.models.losses import LOSSES
from permllm.permutation.contract import LearningPlan
from permllm.permutation.lcp.masked_linear import StraightThrough
from permllm.permutation.lcp.sinkhorn import SinkhornStart
from permllm.permutation.shared import Constraint, SharedOrder, check_constraint, shared_orders
from permllm.permutation.stacks import count_logits
from permllm.validation import check_number, check_one_of, check_whole


@dataclass
class LCPSettings:
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
        """The orders that learn in the window of the layers from `first` to before `stop`: those it holds all groups of."""
        return [order for order in shared if first <= order.layers.start and order.layers.stop <= stop]

    def spans(self, layers: int) -> list[tuple[int, int]]:
        """First layer and the one after the last of each window, for a model of so many decoder layers."""
        first = max(0, layers - self.last_layers) if self.last_layers is not None else 0
        size = self.window if isinstance(self.window, int) else {"model": layers, "layer": 1}[self.window]
        return [(start, min(start + size, layers)) for start in range(first, layers, size)]


def _sharing(order: SharedOrder) -> str:
    if len(order.groups) > 1:
        return order.name
    return f"{order.channels // order.segment} heads of {order.segment}, each {order.repeats} times"
