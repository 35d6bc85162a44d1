"""The settings of masks, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from permllm.errors import check_whole
from permllm.training.settings import LearningSettings


@dataclass(kw_only=True)
class MaskSettings(LearningSettings):
    """Settings of a mask that is learned, in the order that the permutation found."""

    epochs: int = 1
    select_from: int = 0

    def __post_init__(self) -> None:
        self.check("mask")


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
