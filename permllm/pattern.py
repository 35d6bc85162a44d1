"""The pattern N:M itself, without tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from permllm.errors import ConfigError

_POSSIBLE = "N:M needs 0 < N < M, such as 2:4, 4:8, 1:4 or 3:4"


@dataclass(frozen=True)
class NMPattern:
    """Keep `n` of every `m` consecutive weights along the input channels."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ConfigError(f"{self}: {_POSSIBLE}")

    @classmethod
    def parse(cls, text: object, key: str = "sparsity") -> NMPattern:
        """Read `"N:M"`. Raises ConfigError, which names the setting `key`, when `text` has another form."""
        match = re.fullmatch(r"([0-9]+):([0-9]+)", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"{key}={text!r}: expected N:M as a string, such as '2:4' (in YAML, with the quotes)")
        if not 0 < int(match[1]) < int(match[2]):
            raise ConfigError(f"{key}={text}: {_POSSIBLE}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def check_divides(pattern: NMPattern, channels: int, where: str) -> None:
    """Raise ConfigError unless M divides `channels`, the number of input channels of `where`."""
    if channels % pattern.m:
        raise ConfigError(f"{pattern}: M = {pattern.m} does not divide the {channels} input channels of {where}")
