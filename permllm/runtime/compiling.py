"""Code that is compiled for the machine at hand, which may have no compiler or no driver."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config

from permllm.errors import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")


def attempted(fast: Callable[..., T], otherwise: str) -> Callable[..., T | None]:
    """Return a function that calls `fast`, or gives None once a call has failed, with one warning.

    Args:
        fast: compiles at its first call, and may raise anything then. Its result is not None.
        otherwise: consequence of a failure, with which the warning begins.
    """
    failed = False

    def attempt(*arguments: Any) -> T | None:
        nonlocal failed
        if failed:
            return None
        try:
            return fast(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, its cache or a driver may raise
            failed = True
            log.warning("%s: %s", otherwise, first_line(error)[:200])
            return None

    return attempt


def compiled(function: Callable[..., T], otherwise: str) -> Callable[..., T]:
    """Return `function`, compiled for tensors of any size, or as it is where that fails."""

    @cache
    def made() -> Callable[..., T]:
        # Without duck shapes: equal sizes in the first call need not be equal in the next one,
        # which would compile once more.
        settings: Any = torch.fx.experimental._config  # type: ignore[attr-defined]
        options = settings.patch(use_duck_shape=False)
        found: Callable[..., T] = options(torch.compile(function, dynamic=True))
        return found

    def fast(*arguments: Any) -> T:
        return made()(*arguments)

    attempt = attempted(fast, otherwise)

    def run(*arguments: Any) -> T:
        found = attempt(*arguments)
        return function(*arguments) if found is None else found

    return run
