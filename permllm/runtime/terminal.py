"""Answer of a command, the line of its error, and the signals that end it like Ctrl-C."""

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


class Terminated(KeyboardInterrupt):
    """Interruption by another signal than that of Ctrl-C. The argument is its number."""


def exit_code(error: KeyboardInterrupt) -> int:
    """Return a shell's exit code for a signal: Ctrl-C 130, SIGTERM 143, SIGHUP 129."""
    return 128 + (error.args[0] if isinstance(error, Terminated) else signal.SIGINT)


def what_happened(error: KeyboardInterrupt) -> str:
    """Return the message for an interruption."""
    if isinstance(error, Terminated):
        return f"terminated by {signal.Signals(error.args[0]).name}"
    return "interrupted"


# The interruption of this process. Python drops an exception that a handler raises in a callback of
# the interpreter, for example while torch compiles, so that loops ask for it.
_interruption: KeyboardInterrupt | None = None


def raise_if_interrupted() -> None:
    """Raise the interruption of a signal that has arrived; loops call it after each step."""
    if _interruption is not None:
        raise _interruption


@contextmanager
def ending_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, and `Terminated` on SIGTERM and SIGHUP.

    Signals that a launcher handles, or nohup ignores, stay as they are.
    """
    global _interruption
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    mine = []
    if threading.current_thread() is threading.main_thread():  # only it may set handlers
        mine = [number for number in usual if signal.getsignal(number) == usual[number]]

    def end(number: int, _: Any) -> None:
        global _interruption
        if number == signal.SIGINT:
            _interruption = KeyboardInterrupt()
        else:
            for other in mine:  # schedulers repeat signals, which must not stop the last writes
                if other != signal.SIGINT:
                    signal.signal(other, signal.SIG_IGN)
            _interruption = Terminated(number)
        raise _interruption

    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, usual[number])
        if mine:
            _interruption = None
