"""How a command ends: an error that a person can mend is one line, and so is an output that cannot be written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable

from permllm.errors import PermLLMError, one_line
from permllm.runtime.interruption import exit_code, started, what_happened


def run_tool(work: Callable[[], int], failed: int = 1) -> int:
    """Do the work of a command.

    Args:
        work: prints its result, and returns the exit code.
        failed: exit code of an error.

    Returns:
        The exit code; 141, as a shell says it, where whoever read the output has left, as `head` does.
    """
    started()
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(what_happened(error), file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        silence()
        return 141
    except (PermLLMError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        silence()
        return failed


def silence() -> None:
    """Let what is still to be printed go nowhere; the interpreter, too, writes at its end what it holds back."""
    with contextlib.suppress(io.UnsupportedOperation):  # an output that is no file of the system has nothing to fail
        output = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
