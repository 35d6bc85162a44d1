"""Answer of a command, its terminal, and the line and exit code of its error."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permllm.errors import ConfigError, is_told, one_line
from permllm.runtime.signals import exit_code

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Answer:
    """Result of a command.

    Attributes:
        value: plain values for `--json`.
        show: function that prints the answer as text.
        code: exit code: 0, or 1 if the answer is no.
    """

    value: Any
    show: Callable[[], None]
    code: int = 0


def as_json(value: Any) -> str:
    """Return plain values as JSON; numbers that are not finite are null."""
    from pydantic_core import to_json

    return to_json(value, indent=2, inf_nan_mode="null").decode()


def refuse(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ConfigError if one of these options of a command, which would do nothing, is given."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            raise ConfigError(f"--{name}={value}: {reason}; leave it out")


def is_first_rank() -> bool:
    """Tell if this is rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def run_tool(work: Callable[[], int], failed: int = 1, advice: str = "") -> int:
    """Run a command and return its exit code. Under torchrun only rank 0 prints an error.

    Args:
        work: function that prints the result and returns the exit code.
        failed: exit code after an error that the user can fix.
        advice: words after the message of an interruption.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        _print_error(one_line(error) + advice)
        return exit_code(error)
    except BrokenPipeError:
        silence()
        return 141  # a shell's exit code for SIGPIPE
    except Exception as error:
        if not is_told(error):
            raise
        _print_error(f"error: {one_line(error)}")
        silence()
        return failed


def _print_error(message: str) -> None:
    if is_first_rank():
        print(message, file=sys.stderr)


def silence() -> None:
    """Discard further output, because the interpreter would fail again when it ends."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(io.UnsupportedOperation):  # stdout is an object in memory
        output = sys.stdout.fileno()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), output)


def terminal() -> Console:
    """Return a console for tables, as wide as the terminal, or 200 columns for a file.

    A job goes on if the reader of its output, such as `head`, has ended.
    """
    from rich.console import Console  # --help does not need it

    class Terminal(Console):
        """Console that discards output after its reader has ended."""

        def on_broken_pipe(self) -> None:
            """Discard further output."""
            silence()

    console = Terminal()
    return console if console.is_terminal else Terminal(width=200)
