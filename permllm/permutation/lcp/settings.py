"""Settings of learnable channel permutation; `conf/permutation/lcp.yaml` explains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic.dataclasses import dataclass
from typing_extensions import override

from permllm.config import RunConfig
from permllm.errors import ConfigError, check_positive
from permllm.permutation.base import Constraint, LearnedPermutation
from permllm.runtime.values import SETTINGS, Amount, Count, Whole
from permllm.training.settings import LearningSettings, StraightThrough


@dataclass(kw_only=True, config=SETTINGS)
class LCPSettings(LearningSettings, LearnedPermutation):
    """Settings of LCP, and the rules between them and those of the run."""

    block_size: Count
    temperature: Callable[[float], float]
    constraint: Constraint = "free"
    init: Literal["heuristic", "random"] = "heuristic"
    conventions: Literal["ours", "paper"] = "ours"
    sinkhorn_iterations: Whole = 5
    straight_through: StraightThrough = "swap"
    margin: Amount = 0.05
    noise: Amount = 0.02

    @override
    def validate(self, config: RunConfig) -> None:
        super().validate(config)
        for pattern in config.patterns:
            if self.block_size % pattern.m:
                raise ConfigError(
                    f"block_size={self.block_size} is not a multiple of M = {pattern.m} "
                    f"(sparsity={pattern}); valid are {pattern.m}, {2 * pattern.m}, ..."
                )
        for progress in (0.0, 0.5, 1.0):
            check_positive(f"temperature: at progress={progress}", self.temperature(progress))
