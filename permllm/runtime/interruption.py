"""Signals that end a command: SIGTERM and SIGHUP, which schedulers send, end it as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTINUES = "the same command continues where it stopped"


class Terminated(KeyboardInterrupt):
    """Interruption by a signal other than Ctrl-C. The argument is its number."""


def exit_code(error: KeyboardInterrupt) -> int:
    """Return a shell's exit code of the signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (error.args[0] if isinstance(error, Terminated) else signal.SIGINT)


def what_happened(error: KeyboardInterrupt) -> str:
    """Return a word for a person."""
    return f"terminated by {signal.Signals(error.args[0]).name}" if isinstance(error, Terminated) else "interrupted"


@contextmanager
def scheduler_signals() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP, but leave the handlers of a launcher and signals that are ignored (nohup)."""
    # Python sets handlers in its main thread alone.
    main = threading.current_thread() is threading.main_thread()
    mine = [number for number in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(number) == signal.SIG_DFL]

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
