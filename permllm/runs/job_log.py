"""Log of a job in its run directory, with times."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from permllm.errors import one_line
from permllm.runs.environment import command_line
from permllm.runtime.terminal import what_happened

# Goes into the file alone: a terminal has progress bars for it.
noted = logging.getLogger("permllm.noted")
noted.setLevel(logging.INFO)
noted.propagate = False


@contextmanager
def job_log(file: Path) -> Iterator[None]:
    """Append to a file what is logged inside, the command, and why the job ended where it did not finish."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is the record's to tell
    loggers = (logging.getLogger(), noted)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        noted.info("command: %s", command_line())
        yield
        noted.info("finished")
    except BaseException as error:
        said = one_line(error) or type(error).__name__
        noted.error(
            "ended: %s", what_happened(error) if isinstance(error, KeyboardInterrupt) else said
        )
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
