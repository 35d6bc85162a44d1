"""Checks of single settings: each names the key, the value and what is valid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from permllm.errors import ConfigError


def check_whole(key: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`, and at most `most` where that is given."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f" and at most {most}" if most is not None else ""
        raise ConfigError(f"{key}={value!r}: expected a whole number of at least {least}{bound}")


def check_number(key: str, value: Any, *, positive: bool) -> None:
    """Raise ConfigError unless `value` is a finite number above zero (`positive`) or of at least zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise ConfigError(f"{key}={value!r}: expected a {'positive number' if positive else 'number of at least 0'}")


def check_one_of(key: str, value: Any, valid: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `valid`."""
    options = list(valid)
    if value not in options:
        raise ConfigError(f"{key}={value!r} is not valid; valid are: {', '.join(options)}")


def check_contract(key: str, thing: object, flags: Iterable[str], calls: Iterable[str]) -> None:
    """Raise ConfigError unless an object has what it is asked for later: attributes that are true or false, and methods.

    Args:
        key: the setting that named it.
        thing: the object.
        flags: names of the attributes.
        calls: names of the methods.
    """
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    for name in flags:
        if not isinstance(getattr(thing, name, None), bool):
            raise ConfigError(f"{key}: {kind} needs an attribute `{name}` that is true or false")
    for name in calls:
        if not callable(getattr(thing, name, None)):
            raise ConfigError(f"{key}: {kind} needs a method `{name}`")
