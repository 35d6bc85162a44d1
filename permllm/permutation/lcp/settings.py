"""The settings of learnable channel permutation, apart from what it computes: reading them needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from permllm.calibration.norm_over import NormOver
from permllm.errors import ConfigError
from permllm.learning.settings import StraightThrough
from permllm.permutation.settings import Constraint, check_constraint
from permllm.validation import check_number, check_one_of, check_whole

Init = Literal["heuristic", "random"]
TemperatureEvery = Literal["step", "epoch"]
SinkhornStart = Literal["exponential", "softmax"]
Loss = Literal["cosine", "mse", "kl"]


@dataclass
class LCPSettings:
    """Settings of learnable channel permutation.

    Attributes:
        block_size: B, channels that are permuted among themselves.
        temperature: schedule, from progress in [0, 1] to the Sinkhorn temperature.
        constraint: `free`, an order for each channel group; `foldable`, only what neighbouring weights can absorb (see
            `permllm.permutation.shared`). An order that several groups share learns only in a stage that holds all of them,
            and otherwise stays where it starts.
        init: `heuristic` starts at RIA's order with logits close to the assignment boundary (`margin` on the identity plus
            `noise`); `random` is the paper's start: identity order, logits uniform in +-1/sqrt(B) times a learned scale that
            starts at sqrt(B), clamped to +-1 with a gradient that passes.
        temperature_every: how often the temperature changes: each `step`, from 0 to 1 of progress, or each `epoch`, by the
            share of the epochs before it, which never is 1 (the paper's released code).
        sinkhorn_iterations: L; 0 leaves what they start from.
        sinkhorn_start: `exponential` of the logits over the temperature, or `softmax` of their rows (the paper's released
            code); what differs is L = 0.
        norm_over: what the mean square of the inputs in the pruner's saliency is a mean over: `tokens`, or `samples` (the
            paper's released code), which makes every norm larger by the root of a sample's length. The masks are the same,
            and the softmax over each group is sharper where the saliency is not normalised.
        learning_rate: of AdamW, with a cosine schedule to zero over all steps.
        weight_decay: of AdamW.
        epochs: over the calibration samples.
        rounds: how often the epochs are gone through, schedules and all, each time from the best order so far with its groups
            of M dealt anew to the blocks. The mask is the same, and channels meet others than before.
        batch_size: samples a step.
        loss: `kl` of the next-token distributions, which needs `layers_per_stage=all`; `cosine` of the stage's output (the
            paper), or `mse` of it. None is `kl` where the whole model learns together, else `cosine`.
        layers_per_stage: how many consecutive decoder layers learn together: `all` of them (the paper), 1, or so many. Stages
            learn in turn, each on the inputs that the pruned layers before give it, against its own dense output, in the
            memory of its layers alone.
        straight_through: `swap`, `hard` or `soft`, see `permllm.learning.masked_linear`.
        last_layers: learn only the last so many decoder layers, the others get the heuristic permutation; None learns all.
        normalize_saliency: divide each linear's saliency by its mean before the group softmax.
        gumbel: Gumbel noise on the logits over the temperature in each step (Mena et al. 2018), times this; 0 is none.
        margin: logit of the start order over the others (`init=heuristic`).
        noise: half width of the uniform noise on the logits (`init=heuristic`).
        select_from: after each of the last so many epochs the loss of all samples is measured with the order as it then is,
            and the best of these orders is the result; 1 takes the last. Losses during an epoch do not tell: each step has its
            own order and its own samples.
        activation_checkpointing: recompute each decoder layer in backward; None decides by the size of the activations.
        compile: compile the elementwise work of the masked linears, which takes 10 to 20 seconds; None does it where that
            is soon made up for. Without a compiler the step is the slower one.
    """

    block_size: int
    temperature: Callable[[float], float]
    constraint: Constraint = "free"
    init: Init = "heuristic"
    temperature_every: TemperatureEvery = "step"
    sinkhorn_iterations: int = 5
    sinkhorn_start: SinkhornStart = "exponential"
    norm_over: NormOver = "tokens"
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    epochs: int = 3
    rounds: int = 1
    batch_size: int = 4
    loss: Loss | None = None
    layers_per_stage: int | str = "all"
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
        check_one_of("permutation.init", self.init, get_args(Init))
        if self.loss is None:
            self.loss = "kl" if self.layers_per_stage == "all" else "cosine"
        check_one_of("permutation.loss", self.loss, get_args(Loss))
        if self.layers_per_stage != "all":
            if not isinstance(self.layers_per_stage, int):
                raise ConfigError(
                    f"permutation.layers_per_stage={self.layers_per_stage!r} is not valid; valid are: all, a number of layers"
                )
            check_whole("permutation.layers_per_stage", self.layers_per_stage, 1)
            if self.loss == "kl":
                raise ConfigError(
                    "permutation.loss=kl needs permutation.layers_per_stage=all: only the last layer has next-token logits"
                )
        check_one_of("permutation.straight_through", self.straight_through, get_args(StraightThrough))
        check_one_of("permutation.temperature_every", self.temperature_every, get_args(TemperatureEvery))
        check_whole("permutation.sinkhorn_iterations", self.sinkhorn_iterations, 0)
        check_one_of("permutation.sinkhorn_start", self.sinkhorn_start, get_args(SinkhornStart))
        check_one_of("permutation.norm_over", self.norm_over, get_args(NormOver))
        for name in ("epochs", "rounds", "batch_size", "select_from"):
            check_whole(f"permutation.{name}", getattr(self, name), 1)
        check_number("permutation.learning_rate", self.learning_rate, positive=True)
        for name in ("weight_decay", "gumbel", "margin", "noise"):
            check_number(f"permutation.{name}", getattr(self, name), positive=False)
        if self.last_layers is not None:
            check_whole("permutation.last_layers", self.last_layers, 1)
