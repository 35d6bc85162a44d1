"""Settings that all learning shares, apart from what it computes: reading them needs no torch."""

from __future__ import annotations

from typing import Literal

StraightThrough = Literal["swap", "hard", "soft"]
