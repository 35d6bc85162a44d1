"""The settings of learnable channel permutation, apart from what it computes: reading them needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from permllm.errors import ConfigError, check_number, check_one_of, check_whole
from permllm.permutation.settings import Constraint, check_constraint
from permllm.training.settings import LearningSettings, StraightThrough

Init = Literal["heuristic", "random"]
Conventions = Literal["ours", "paper"]


@dataclass(kw_only=True)
class LCPSettings(LearningSettings):
    """Settings of learnable channel permutation.

    Attributes:
        block_size: B, channels that are permuted among themselves.
        temperature: schedule, from progress in [0, 1] to the Sinkhorn temperature.
        constraint: `free`, an order for each channel group; `foldable`, only what neighbouring weights can absorb (see
            `permllm.permutation.foldable`). An order that several groups share learns only in a stage that holds all of them,
            and otherwise stays where it starts.
        init: `heuristic` starts at RIA's order with logits close to the assignment boundary (`margin` on the identity plus
            `noise`); `random` is the paper's start: identity order, logits uniform in +-1/sqrt(B) times a learned scale that
            starts at sqrt(B), clamped to +-1 with a gradient that passes.
        sinkhorn_iterations: L; 0 leaves what they start from.
        conventions: `ours`, or `paper` for those of the paper's released code, which differ in four details. Ours: each
            linear's saliency is divided by its mean before the group softmax; the mean square of the inputs is over tokens;
            the temperature changes each step, from 0 to 1 of progress; Sinkhorn starts from the exponential of the logits
            over the temperature. The paper's: no division; a mean over samples, which makes each norm larger by the root of
            a sample's length, and the softmax sharper; each epoch, by the share of epochs before it; a softmax over rows.
        straight_through: `swap`, `hard` or `soft`, see `permllm.training.masked_linear`.
        last_layers: learn only the last so many decoder layers, the others get the heuristic permutation; None learns all.
        margin: logit of the start order over the others (`init=heuristic`).
        noise: half width of the uniform noise on the logits (`init=heuristic`).
    """

    block_size: int
    temperature: Callable[[float], float]
    constraint: Constraint = "free"
    init: Init = "heuristic"
    conventions: Conventions = "ours"
    sinkhorn_iterations: int = 5
    straight_through: StraightThrough = "swap"
    margin: float = 0.05
    noise: float = 0.02
    learned = True
    local = False

    def __post_init__(self) -> None:
        check_constraint(self.constraint)
        check_one_of("permutation.init", self.init, get_args(Init))
        check_one_of("permutation.straight_through", self.straight_through, get_args(StraightThrough))
        check_one_of("permutation.conventions", self.conventions, get_args(Conventions))
        check_whole("permutation.sinkhorn_iterations", self.sinkhorn_iterations, 0)
        self.check("permutation")
        check_temperature(self.temperature)
        for name in ("margin", "noise"):
            check_number(f"permutation.{name}", getattr(self, name), positive=False)


def check_temperature(schedule: object) -> None:
    """Raise ConfigError unless a schedule gives a positive temperature at the start, in the middle and at the end."""
    kind = f"temperature: {type(schedule).__module__}.{type(schedule).__qualname__}"
    if not callable(schedule):
        raise ConfigError(f"{kind} needs a method `__call__`, from progress in [0, 1] to a temperature")
    for progress in (0.0, 0.5, 1.0):
        try:
            found = schedule(progress)
        except Exception as error:  # a schedule of someone else's may raise anything
            raise ConfigError(f"{kind} cannot be called with progress={progress}: {error}") from error
        check_number(f"{kind}: at progress={progress}", found, positive=True)
