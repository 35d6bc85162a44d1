"""Answer of a command, its terminal, and the line and exit code of its error."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permllm.errors import ConfigError, is_user_error, one_line
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


def run_tool(work: Callable[[], int | None], failed: int = 1, in_json: bool = False) -> int:
    """Run a command and return its exit code. A defect is raised.

    Args:
        work: function that prints the result and may return an exit code.
        failed: exit code after an error that the user can fix.
        in_json: print such an error as JSON too.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        silence()
        return 141  # a shell's exit code for SIGPIPE
    except KeyboardInterrupt as error:
        tell(error)
        return exit_code(error)
    except Exception as error:
        if not is_user_error(error):
            raise
        line = tell(error)
        if in_json:
            print(json.dumps({"error": line}))
        silence()
        return failed


def exit_on_error(work: Callable[[], None]) -> None:
    """Run a part of a command, inside of Hydra, which would print other errors in its own way.

    It prints an error that the user can fix, or an interruption, and raises SystemExit.
    """
    if code := run_tool(work):
        raise SystemExit(code)


def tell(error: BaseException) -> str:
    """Print an error in rank 0, a defect with its traceback, and return it as one line."""
    line = one_line(error)
    if not is_first_rank():
        return line
    if isinstance(error, KeyboardInterrupt):
        print(line, file=sys.stderr)
    elif is_user_error(error):
        print(f"error: {line}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return line


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
