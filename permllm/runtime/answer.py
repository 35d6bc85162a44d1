"""What a command found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        value: plain values, for `--json`.
        show: prints the same for a person.
        code: exit code: 0, or 1 where the answer is no.
    """

    value: Any
    show: Callable[[], None]
    code: int = 0
