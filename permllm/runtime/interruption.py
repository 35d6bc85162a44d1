"""Ctrl-C, and what schedulers send: SIGTERM and SIGHUP end a job as Ctrl-C does, with a record and a word."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTINUES = "the same command continues where it stopped"

# SIGHUP is no signal of Windows.
_SENT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """A scheduler, or whoever else, sent a signal that ends the process.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def starting() -> None:
    """Until `started`, Ctrl-C is one line: imports take seconds, and would show what was being imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupted_early)


def started() -> None:
    """From here on Ctrl-C is a `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _interrupted_early:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted_early(*_: Any) -> None:
    os.write(2, b"interrupted: nothing had begun\n")
    os._exit(128 + signal.SIGINT)


def exit_code(error: KeyboardInterrupt) -> int:
    """What a shell makes of the signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)


def is_interruption(code: object) -> bool:
    """Whether an exit code is one of `exit_code`."""
    return code in {128 + number for number in (signal.SIGINT, *_SENT)}


def what_happened(error: KeyboardInterrupt) -> str:
    """A word for a person."""
    return f"terminated by {signal.Signals(error.number).name}" if isinstance(error, Terminated) else "interrupted"


@contextmanager
def scheduler_signals() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP, inside.

    A handler that somebody else has set, such as a launcher's own, stays; so does a signal that is ignored, as under nohup.
    """
    # Python handles signals in its main thread alone.
    main = threading.current_thread() is threading.main_thread()
    mine = [number for number in _SENT if main and signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, _: Any) -> None:
        # Schedulers repeat them, and send SIGKILL to what does not end: the record is written undisturbed.
        for other in mine:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
