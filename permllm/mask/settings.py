"""The settings of masks, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from permllm.errors import ConfigError, check_one_of, check_whole
from permllm.learning.settings import LearningSettings

Orders = Literal["fixed", "together", "turns", "searched"]


@dataclass(kw_only=True)
class MaskSettings(LearningSettings):
    """Settings of a mask that is learned.

    Attributes:
        learning_rate: of AdamW, with a cosine schedule to zero over all steps.
        orders: `fixed`, the mask learns in the order that the permutation found; `together`, the order learns through the
            mask, from where `permutation=lcp` starts, with its rate, temperature, blocks, constraint and Sinkhorn
            normalisation (steps, samples, loss, stages, weight decay and everything else of a step are the mask's, and what
            the permutation says of them has no effect); `turns`, the same with order and mask in every other step;
            `searched`, between rounds the heuristic searches an order anew that retains the most of what the masks have
            learned by then.
        rounds: how often the epochs or steps are gone through, schedules and all, each time from the scores before.
    """

    epochs: int = 1
    select_from: int = 0
    orders: Orders = "fixed"
    rounds: int = 1

    def __post_init__(self) -> None:
        self.check("mask")
        check_one_of("mask.orders", self.orders, get_args(Orders))
        check_whole("mask.rounds", self.rounds, 1)
        if self.orders == "searched" and self.rounds == 1:
            raise ConfigError("mask.orders=searched searches an order between rounds: set mask.rounds to 2 or more")


@dataclass(kw_only=True)
class LowRankSettings(MaskSettings):
    """Settings of a mask that is learned with few parameters.

    Attributes:
        rank: of the term that is added to the logarithm of the saliency, beside a number a channel.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("mask.rank", self.rank, 0)
