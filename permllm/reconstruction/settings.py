"""The settings of reconstructions, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from permllm.errors import ConfigError
from permllm.learning.settings import DescentSettings
from permllm.validation import check_number, check_one_of, check_whole

Columns = Literal["permuted", "costly"]
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


@dataclass(frozen=True)
class BlockSettings:
    """Settings of the descent layer by layer.

    Attributes:
        epochs: over the calibration samples, in batches of `calibration.batch_size`.
        learning_rate: of Adam at the start, with a cosine schedule to zero.
    """

    epochs: int = 4
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        check_whole("reconstruction.epochs", self.epochs, 1)
        check_number("reconstruction.learning_rate", self.learning_rate, positive=True)


@dataclass(kw_only=True)
class DistillSettings(DescentSettings):
    """Settings of the distillation.

    Attributes:
        average: share of the steps, the last ones, whose weights' mean is the result; 0 takes the last weights.
        start: what the kept weights are before, linear by linear: `masked`, as the pruner left them; `obs` or `admm`, what
            `reconstruction=obs` or `reconstruction=admm` makes of them.
    """

    learning_rate: float = 1e-4
    epochs: int = 2
    average: float = 0.0
    start: Start = "masked"

    def __post_init__(self) -> None:
        self.check("reconstruction")
        check_number("reconstruction.average", self.average, positive=False)
        check_one_of("reconstruction.start", self.start, get_args(Start))
        if self.average > 1:
            raise ConfigError(f"reconstruction.average={self.average!r}: expected a share of the steps, from 0 to 1")


@dataclass(frozen=True)
class OBSSettings:
    """Settings of SparseGPT's correction.

    Attributes:
        damping: lambda as a share of the mean diagonal of `X X^T`.
        columns: the order that they are corrected in, each made up for by those after it: `permuted`, or `costly`, first those
            whose pruned weights cost most.
    """

    damping: float = 0.01
    columns: Columns = "permuted"

    def __post_init__(self) -> None:
        check_number("reconstruction.damping", self.damping, positive=True)
        check_one_of("reconstruction.columns", self.columns, get_args(Columns))
