"""Output of a command, one line for its error, and the signals that end it as Ctrl-C does."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permllm.errors import PermLLMError, one_line

if TYPE_CHECKING:
    from rich.console import Console

CONTINUES = "the same command continues where it stopped"


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
    """Return the exit code of a command.

    Args:
        work: prints the result and returns the exit code.
        failed: exit code after the line of an error.
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
        return 141  # the exit code that a shell has for SIGPIPE
    except (PermLLMError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        silence()
        return failed


def silence() -> None:
    """Discard further output: the interpreter would fail again to write its buffer at its end."""
    with contextlib.suppress(io.UnsupportedOperation):  # not a file of the system: it cannot fail
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


class Terminated(KeyboardInterrupt):
    """Interruption by a signal other than Ctrl-C. The argument is its number."""


def exit_code(error: KeyboardInterrupt) -> int:
    """Return a shell's exit code of the signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (error.args[0] if isinstance(error, Terminated) else signal.SIGINT)


def what_happened(error: KeyboardInterrupt) -> str:
    """Return a word for a person."""
    if isinstance(error, Terminated):
        return f"terminated by {signal.Signals(error.args[0]).name}"
    return "interrupted"


@contextmanager
def scheduler_signals() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP, unless a launcher handles or nohup ignores them."""
    mine = []
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        both = (signal.SIGTERM, signal.SIGHUP)
        mine = [number for number in both if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, _: Any) -> None:
        for other in mine:  # schedulers repeat signals, and the record must be written undisturbed
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
