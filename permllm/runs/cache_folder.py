"""Where jobs keep what others can use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from platformdirs import user_cache_path

from permllm.errors import ConfigError, DataError

# What the settings of the job say.
_CHOSEN: list[str] = []


def choose_cache(folder: str | None) -> None:
    """Take what is kept from here on from a folder (`paths.cache_dir`); None leaves it to the environment."""
    _CHOSEN[:] = [folder] if folder else []


def cache_directory() -> Path:
    """What was chosen, else `PERMLLM_CACHE`, else a folder `permllm` in the user's cache directory; made when missing."""
    path = Path(*_CHOSEN) if _CHOSEN else Path(os.environ.get("PERMLLM_CACHE") or user_cache_path("permllm"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the cache directory {path} cannot be made ({error.strerror}); set PERMLLM_CACHE") from error
    return path


def cache_bound() -> int | None:
    """Bytes that kept results may take: `PERMLLM_CACHE_GB`, in 10^9 bytes; None is no bound.

    Raises:
        ConfigError: it is no number.
    """
    text = os.environ.get("PERMLLM_CACHE_GB")
    if not text:
        return None
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not 0 <= bound < math.inf:
        raise ConfigError(f"PERMLLM_CACHE_GB={text}: expected a number of 10^9 bytes")
    return int(bound * 1e9)
