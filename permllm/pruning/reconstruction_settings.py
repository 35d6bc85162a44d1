"""The settings of reconstructions, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from permllm.errors import check_number, check_one_of, check_whole
from permllm.training.settings import DescentSettings

Start = Literal["masked", "obs", "admm"]


@dataclass(frozen=True)
class ADMMSettings:
    """Settings of the least squares under the mask.

    Attributes:
        iterations: of conjugate gradients, at most; they stop where an iteration gains less than 0.1 % of the error.
        damping: what keeps weights near the dense ones, as a share of the mean diagonal of `X X^T`.
    """

    iterations: int = 12
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_whole("reconstruction.iterations", self.iterations, 1)
        check_number("reconstruction.damping", self.damping, positive=True)


@dataclass(kw_only=True)
class DistillSettings(DescentSettings):
    """Settings of the distillation.

    Attributes:
        skip: how many windows of the text are passed over before those that it learns from, so that it learns from others than
            what learned before it, or than the statistics are of. Where `calibration.sampling` lets windows overlap, text may
            come again.
        start: what the kept weights are before, linear by linear: `masked`, as the pruner left them; `obs` or `admm`, what
            `reconstruction=obs` or `reconstruction=admm` makes of them.
    """

    learning_rate: float = 1e-4
    epochs: int = 2
    skip: int = 0
    start: Start = "masked"

    def __post_init__(self) -> None:
        self.check("reconstruction")
        check_whole("reconstruction.skip", self.skip, 0)
        check_one_of("reconstruction.start", self.start, get_args(Start))


@dataclass(frozen=True)
class OBSSettings:
    """Settings of SparseGPT's correction.

    Attributes:
        damping: lambda as a share of the mean diagonal of `X X^T`.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        check_number("reconstruction.damping", self.damping, positive=True)
