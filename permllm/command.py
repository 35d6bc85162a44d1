"""Answer of a command, its terminal, and the line and exit code of its error."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permllm.errors import PermLLMError, one_line
from permllm.runtime.signals import exit_code, what_happened

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


def run_tool(work: Callable[[], int], failed: int = 1) -> int:
    """Run a command and return its exit code.

    Args:
        work: function that prints the result and returns the exit code.
        failed: exit code after an error that the user can fix.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(what_happened(error), file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        silence()
        return 141  # a shell's exit code for SIGPIPE
    except (PermLLMError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        silence()
        return failed


def silence() -> None:
    """Discard further output, because the interpreter would fail again when it ends."""
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
