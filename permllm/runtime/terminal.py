"""Output of a command: its answer, its tables, and one line for an error."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permllm.errors import PermLLMError, one_line
from permllm.runtime.interruption import exit_code, what_happened

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Answer:
    """Result of a command.

    Attributes:
        value: plain values, for `--json`.
        show: prints the same for a person.
        code: exit code: 0, or 1 where the answer is no.
    """

    value: Any
    show: Callable[[], None]
    code: int = 0


def run_tool(work: Callable[[], int], failed: int = 1) -> int:
    """Return the exit code of a command: that of its work, which prints the result, or `failed` after an error's line."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(what_happened(error), file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        silence()
        return 141  # the exit code that a shell has for SIGPIPE
    except (PermLLMError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        silence()
        return failed


def silence() -> None:
    """Discard further output, because the interpreter writes its buffer at its end and would fail again."""
    with contextlib.suppress(io.UnsupportedOperation):  # an output that is no file of the system cannot fail
        output = sys.stdout.fileno()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), output)


def terminal() -> Console:
    """Return a console for tables: as wide as the terminal, or wide enough for any table in a file.

    A job goes on when the reader of its output has left, as `head` does.
    """
    from rich.console import Console  # not for --help

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            silence()

    console = Terminal()
    return console if console.is_terminal else Terminal(width=200)
