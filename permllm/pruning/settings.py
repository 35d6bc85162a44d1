"""The settings of the base pruners, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from permllm.errors import check_number


@dataclass(frozen=True)
class RIASettings:
    """Settings of RIA.

    Attributes:
        exponent: power of the activation norm, 0.5 in RIA's and in the PermLLM paper.
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        check_number("pruner.exponent", self.exponent, positive=False)


@dataclass(frozen=True)
class SparseGPTSettings:
    """Settings of SparseGPT.

    Attributes:
        damping: lambda as a share of the mean diagonal of `X X^T`, 0.01 in the paper.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        check_number("pruner.damping", self.damping, positive=True)
