"""The console that tables are printed to."""

from __future__ import annotations

from rich.console import Console

from permllm.runtime.tool import silence


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the output has left, as `head` does: what is left goes nowhere, and the work goes on."""
        silence()


def terminal() -> Console:
    """Console for tables: the width of the terminal, or wide enough for any table when the output goes to a file."""
    console = _Terminal()
    return console if console.is_terminal else _Terminal(width=200)
