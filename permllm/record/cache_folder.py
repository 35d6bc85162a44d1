"""Where jobs keep what others can use."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from permllm.errors import DataError


def cache_directory() -> Path:
    """`PERMLLM_CACHE`, or a folder `permllm` in the user's cache directory; made when missing."""
    path = Path(os.environ.get("PERMLLM_CACHE") or user_cache_path("permllm"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the cache directory {path} cannot be made ({error.strerror}); set PERMLLM_CACHE") from error
    return path
