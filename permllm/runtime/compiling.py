"""Code that a compiler makes for the machine at hand, which may have no compiler, or no driver that runs what it makes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from permllm.errors import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")


def usable(made: Callable[[], T], device_type: str, otherwise: str) -> T | None:
    """What `made` has compiled and run once, as it will be used; None, with a warning, where that fails.

    A failure at first use would come in the middle of backward, or of a step that is timed.

    Args:
        made: compiles, runs once, and returns what it has compiled.
        device_type: where it ran: what fails on `cuda` is seen when it has been waited for.
        otherwise: what happens without, with which the warning begins.
    """
    try:
        with torch.no_grad():  # as in the passes of an autograd function: for the other mode it would be compiled once more
            found = made()
        if device_type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler, its cache or a driver may raise
        log.warning("%s: %s", otherwise, first_line(error)[:200])
        return None
    return found
