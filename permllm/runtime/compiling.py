"""Compiled functions with a fallback, because a machine may have no compiler or no driver."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config

from permllm.errors import first_line, tracebacks_wanted

log = logging.getLogger(__name__)

T = TypeVar("T")


def with_fallback(fast: Callable[..., T], otherwise: str) -> Callable[..., T | None]:
    """Return a function that calls `fast`, and after a failure always returns None.

    With `HYDRA_FULL_ERROR=1` the failure is raised, because it may be a defect of `fast`.

    Args:
        fast: function that compiles at its first call and may then raise any error. Its result is
            not None.
        otherwise: consequence of a failure, the beginning of the only warning.
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
        except Exception as error:  # of a compiler, its cache or a driver
            if tracebacks_wanted():
                raise
            failed = True
            log.warning("%s: %s", otherwise, first_line(error)[:200])
            return None

    return attempt


def compiled(function: Callable[..., T], otherwise: str) -> Callable[..., T]:
    """Return `function`, compiled for tensors of any size, or unchanged if that fails."""

    @cache
    def compiled_once() -> Callable[..., T]:
        # With duck shapes, sizes that are equal by chance in the first call cost a second
        # compilation.
        settings: Any = torch.fx.experimental._config  # type: ignore[attr-defined]
        return settings.patch(use_duck_shape=False)(torch.compile(function, dynamic=True))

    def fast(*arguments: Any) -> T:
        return compiled_once()(*arguments)

    attempt = with_fallback(fast, otherwise)

    def run(*arguments: Any) -> T:
        value = attempt(*arguments)
        return function(*arguments) if value is None else value

    return run
