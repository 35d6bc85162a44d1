"""Signals that end a command like Ctrl-C, and the line that says so."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTINUES = "the same command continues where it stopped"


class Terminated(KeyboardInterrupt):
    """Interruption of a job by a signal. The argument is its number."""

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.args[0]).name}: {CONTINUES}"


def exit_code(error: KeyboardInterrupt) -> int:
    """Return a shell's exit code for a signal: Ctrl-C 130, SIGTERM 143, SIGHUP 129."""
    return 128 + (error.args[0] if isinstance(error, Terminated) else signal.SIGINT)


# The interruption of this process. Python drops an exception that a handler raises in a callback of
# the interpreter, for example while torch compiles, so that loops ask for it.
_interruption: KeyboardInterrupt | None = None


def raise_if_interrupted() -> None:
    """Raise the interruption of a signal that has arrived; loops call it after each step."""
    if _interruption is not None:
        raise _interruption


@contextmanager
def ending_signals() -> Iterator[None]:
    """Raise `Terminated` on SIGINT, SIGTERM and SIGHUP.

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
        for other in mine:  # schedulers repeat signals, which must not stop the last writes
            if signal.SIGINT not in (number, other):
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
