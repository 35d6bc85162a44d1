"""Errors that the user can fix. Each is one line: the key or file, its value, what is expected."""

import os

# Variable that this package sets together with `HYDRA_FULL_ERROR`. It tells that the package, not
# the user, asked Hydra to raise its errors.
SHORT_ERRORS = "PERMLLM_SHORT_ERRORS"


class PermLLMError(Exception):
    """Base of the errors that are reported as one line without a traceback."""


class ConfigError(PermLLMError):
    """A setting has a value that cannot work."""


class InUseError(ConfigError):
    """Another process uses the same run directory."""


class DataError(PermLLMError):
    """A model, text or wheel is not available or damaged."""


class TrainingError(PermLLMError):
    """Learning cannot continue, for example because the loss is not finite."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, or its class if the error has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return the line that the user sees for an error or an interruption."""
    if _lacks_memory(error):
        return (
            "the GPU's memory is not enough: permutation.micro_batch_size=1 (or the mask's, or "
            "reconstruction's) computes a step window by window, with the same result; "
            "model.placement=host moves layers to the GPU one by one; plan=true lists the memory "
            "of each placement"
        )
    line = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return line or "interrupted"
    if isinstance(error, PermLLMError | OSError | SystemExit):
        return line
    return f"{type(error).__name__}: {line}"


def _lacks_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # from torch, whose import takes long


def printable(name: str) -> str:
    """Return a name from a file with escapes for characters that would control a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def tracebacks_wanted() -> bool:
    """Tell if the user asks for tracebacks by `HYDRA_FULL_ERROR=1`."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and SHORT_ERRORS not in os.environ


def is_user_error(error: BaseException) -> bool:
    """Return True for an error that the user can fix, unless the user wants tracebacks."""
    fixable = isinstance(error, PermLLMError | OSError) or _lacks_memory(error)
    return fixable and not tracebacks_wanted()
