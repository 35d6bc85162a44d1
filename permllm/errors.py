"""Errors that a person can mend. Each is one line: the key or file, its value, what is valid."""

import math
import os
from collections.abc import Sequence
from typing import Any

# Set beside `HYDRA_FULL_ERROR` by this package, so that Hydra raises what it would print.
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
    """Return the first line of a library's error, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return an error as it is shown to a person."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which takes long to import
        return (
            "the GPU's memory is not enough: permutation.micro_batch_size=1 (or the mask's, or "
            "reconstruction's) computes a step sample by sample, with the same result; "
            "model.placement=host brings layers singly; plan=true says what fits"
        )
    return " ".join(str(error).split())


def printable(name: str) -> str:
    """Return a name from a stranger's file without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def everything_wanted() -> bool:
    """Tell if `HYDRA_FULL_ERROR=1` asks for the whole of an error."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and SHORT_ERRORS not in os.environ


def check_whole(key: str, value: Any, least: int) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r}: expected a whole number of at least {least}")


def check_positive(key: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a finite number above zero."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r}: expected a positive number")


def check_one_of(key: str, value: Any, valid: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `valid`."""
    if value not in valid:
        raise ConfigError(f"{key}={value!r} is not valid; valid are: {', '.join(valid)}")
