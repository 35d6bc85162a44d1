"""Settings and metrics are nested; tables and messages want them flat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested values as one level, keys joined by the separator; what is empty goes."""
    flat: dict[str, Any] = {}
    for key, part in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(part, separator, f"{name}{separator}") if isinstance(part, Mapping) else {name: part}
    return flat


def finite(value: Any) -> Any:
    """The values without NaN and infinity, which JSON has not: None stands there."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
