"""The settings of masks, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from permllm.learning.settings import LearningSettings
from permllm.validation import check_one_of, check_whole

Orders = Literal["fixed", "together", "turns"]


@dataclass(kw_only=True)
class ScoreSettings(LearningSettings):
    """Settings of a mask that is learned.

    Attributes:
        learning_rate: of AdamW, with a cosine schedule to zero over all steps.
        orders: `fixed`, the mask learns in the order that the permutation found; `together`, the order learns through the
            mask, with the settings of `permutation=lcp`, from where that starts; `turns`, the same with order and mask in
            every other step.
    """

    epochs: int = 1
    select_from: int = 0
    orders: Orders = "fixed"

    def __post_init__(self) -> None:
        self.check("mask")
        check_one_of("mask.orders", self.orders, get_args(Orders))


@dataclass(kw_only=True)
class LowRankSettings(ScoreSettings):
    """Settings of a mask that is learned with few parameters.

    Attributes:
        rank: of the term that is added to the logarithm of the saliency, beside a number a channel.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("mask.rank", self.rank, 0)
