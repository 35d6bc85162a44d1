"""Cache of results that several jobs need.

Jobs that run at the same time wait for the first one by a lock for each result. The cache directory
can be deleted at any time; its results are then computed again. `PERMLLM_CACHE_GB` limits it, 20 GB
by default: results that were not read for longest leave.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from torch import Tensor

from permllm.errors import DataError
from permllm.runtime import parallel
from permllm.runtime.files import cache_directory, cache_lock
from permllm.store.environment import git_commit, versions
from permllm.store.tensors import load_state, save_state

log = logging.getLogger(__name__)

Values = TypeVar("Values", bound=Mapping[str, Any])


def cached(
    kind: str,
    key: Mapping[str, Any],
    compute: Callable[[], Values],
    hits: dict[str, bool] | None = None,
) -> Values:
    """Return the values of `compute` from the cache, or compute and keep them.

    All ranks get the values of rank 0. If the package has uncommitted changes, nothing is read or
    kept, because its commit does not determine the result.

    Args:
        kind: name of the kind of result.
        key: plain values that determine the result, together with the versions of this package and
            its libraries.
        compute: returns tensors by name, on the CPU, or plain values by name.
        hits: by kind, whether its first result came from the cache; gets the value of this kind.
    """
    commit = parallel.on_main(git_commit)
    if commit is not None and commit["dirty"]:
        return parallel.broadcast(compute())
    software = {"versions": versions(), "commit": commit}
    text = json.dumps({"kind": kind, **key, "software": software}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    file = parallel.on_main(lambda: cache_directory() / "results" / f"{name}.pt")
    with ExitStack() as locks:

        def locked_and_read() -> Values | None:
            """Lock the result until it is written, and read it; None: it is not in the cache."""
            file.parent.mkdir(exist_ok=True)
            locks.enter_context(FileLock(file.with_suffix(".lock")))
            return _read(file)

        values = parallel.on_main(locked_and_read)
        if hits is not None:
            hits.setdefault(kind, values is not None)
        if values is None:
            values = parallel.broadcast(compute())
            parallel.on_main(lambda: _write(file, values))
        return values


def _read(file: Path) -> Any:
    """Return a result; None: there is none, or it cannot be read."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return None
    try:
        return load_state(file, torch.device("cpu"))
    except DataError as error:
        log.warning("%s: computing it again", error)
        return None


def _write(file: Path, values: Mapping[str, Any]) -> None:
    try:
        save_state(file, dict(values))
    except DataError as error:  # the job has its result although the disk is full
        log.warning("not kept for other jobs: %s", error)
    with cache_lock("results"):
        _remove_oldest(file.parent)


def _remove_oldest(folder: Path) -> None:
    """Remove the results that were not read for longest until the others are within the limit."""
    limit = 1e9 * float(os.environ.get("PERMLLM_CACHE_GB", "20"))
    results = sorted(folder.glob("*.pt"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in results)
    for file in results:
        if total <= limit:
            break
        total -= file.stat().st_size
        file.unlink(missing_ok=True)
        log.info("%s left the cache, which has a limit of %.0f GB", file.name, limit / 1e9)


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a CPU tensor's values, shape and dtype."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.contiguous().numpy().tobytes()).hexdigest()
