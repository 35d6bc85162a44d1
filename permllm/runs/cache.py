"""Results that several jobs need: computed once, and kept in the cache directory.

A lock for each result lets jobs that run at the same time wait for the first of them. Deleting the
folder costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from platformdirs import user_cache_path
from torch import Tensor

from permllm.errors import DataError
from permllm.runs.environment import git_commit, versions
from permllm.runs.files import read_json, write_json
from permllm.runs.tensors import load_tensors, save_tensors
from permllm.runtime import parallel

log = logging.getLogger(__name__)

Values = TypeVar("Values", bound=Mapping[str, Any])

_RESULTS = "results"
# The folder that the settings of the job name.
_CHOSEN: list[str] = []


def cached(kind: str, key: Mapping[str, Any], compute: Callable[[], Values]) -> Values:
    """Return `compute()`, or what an earlier job kept of it; in all ranks rank 0's values.

    Args:
        kind: name of the kind of result.
        key: plain values that determine the result, beside the versions of this package and its
            libraries.
        compute: gives tensors by name, on the CPU, or plain values by name.
    """
    software = {"versions": versions(), "commit": git_commit()}
    text = json.dumps({"kind": kind, **key, "software": software}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    with ExitStack() as held:

        def kept() -> Values | None:
            file = cache_directory() / _RESULTS / name
            file.parent.mkdir(exist_ok=True)
            held.enter_context(FileLock(file.with_suffix(".lock")))
            return _read(file)

        values = parallel.on_main(kept)
        if values is None:
            values = parallel.share(compute())
            parallel.on_main(lambda: _write(cache_directory() / _RESULTS / name, values))
        return values


def _read(file: Path) -> Any:
    """Return what is kept; None: there is nothing, or it is unreadable."""
    forms: dict[str, Callable[[Path], Any]] = {".json": read_json, ".safetensors": load_tensors}
    try:
        for suffix, load in forms.items():
            if (kept := file.with_suffix(suffix)).exists():
                return load(kept)
    except DataError as error:
        log.warning("%s: computing it again", error)
    return None


def _write(file: Path, values: Mapping[str, Any]) -> None:
    try:
        if all(isinstance(value, Tensor) for value in values.values()):
            save_tensors(file.with_suffix(".safetensors"), values)
        else:
            write_json(file.with_suffix(".json"), values)
    except DataError as error:  # a full disk must not cost a job what it has just computed
        log.warning("not kept for other jobs: %s", error)


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a CPU tensor's values, shape and dtype."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.contiguous().numpy().tobytes()).hexdigest()


def choose_cache(folder: str | None) -> None:
    """Use a folder as the cache directory from here on; None: the environment names it."""
    _CHOSEN[:] = [folder] if folder else []


def cache_directory() -> Path:
    """Return, and make, the chosen folder, `PERMLLM_CACHE`, or `permllm` in the user's cache."""
    usual = os.environ.get("PERMLLM_CACHE") or str(user_cache_path("permllm"))
    path = Path(*_CHOSEN or [usual])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"PERMLLM_CACHE: cannot make {path} ({error.strerror})") from error
    return path
