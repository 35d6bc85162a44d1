"""The errors that a person can cause and mend: each is one line that names what was wrong, the value, and what is valid."""

import math
import os
from collections.abc import Iterable
from typing import Any

# Set where Hydra is made to raise what it would print: `HYDRA_FULL_ERROR` is then not what a person has set.
SHORT_ERRORS = "PERMLLM_SHORT_ERRORS"


class PermLLMError(Exception):
    """Base of the errors that are reported as one line without a traceback."""


class ConfigError(PermLLMError):
    """A setting has a value that cannot work."""


class InUseError(ConfigError):
    """Another process is at work on the same run."""


class DataError(PermLLMError):
    """A model, text or wheel could not be had, or is not what it should be."""


class TrainingError(PermLLMError):
    """Learning the permutations cannot go on, for example because the loss is not finite."""


def first_line(error: BaseException) -> str:
    """The first line of what a library says, or what kind of error it is where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """What a person reads of an error."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which takes long to import
        return (
            "the GPU's memory is not enough: permutation.micro_batch_size=1 (or the mask's, or reconstruction's) computes a "
            "step sample by sample, with the same result; model.placement=host brings layers singly; plan=true says what fits"
        )
    return " ".join(str(error).split())


def printable(name: str) -> str:
    """A name from a file of others as it can be shown: no line of its own, nothing that a terminal obeys."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)


def everything_wanted() -> bool:
    """Whether `HYDRA_FULL_ERROR=1` asks for the whole of an error."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and SHORT_ERRORS not in os.environ


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
