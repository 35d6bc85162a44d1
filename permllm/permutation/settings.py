"""The settings of the permutations but LCP's, apart from what they compute: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from permllm.errors import check_one_of

Constraint = Literal["free", "foldable"]


def check_constraint(constraint: str) -> None:
    """Raise ConfigError when it is not a constraint."""
    check_one_of("permutation.constraint", constraint, get_args(Constraint))


@dataclass(frozen=True)
class HeuristicSettings:
    """Settings of RIA's channel reallocation.

    Attributes:
        constraint: `free`, an order for each channel group; `foldable`, only what neighbouring weights absorb
            (`permllm.permutation.foldable`).
    """

    constraint: Constraint = "free"

    def __post_init__(self) -> None:
        check_constraint(self.constraint)


@dataclass
class FromFileSettings:
    """Settings of an order that another run found or learned.

    Attributes:
        path: a run directory, or a `permutations.safetensors`.
    """

    path: str
