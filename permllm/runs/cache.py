"""Results that several jobs need are computed once: kept in the cache directory under a digest of what they follow from.

A lock for each digest lets jobs that run at the same time, in any processes that share the folder, wait for the first of them
instead of computing the same. Kept files are never changed, and one that was is computed again; deleting the folder costs time
and nothing else. PERMLLM_CACHE_GB bounds them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import TypedDict

from permllm.errors import DataError
from permllm.runs.cache_folder import cache_bound, cache_directory
from permllm.runs.code import code_digest
from permllm.runs.environment import versions
from permllm.runs.files import read_json, scratch_of, write_record
from permllm.runs.schema import Object, Schema, validated
from permllm.runs.tensor_file import read_header, read_tensors
from permllm.runs.tensors import write_tensors

log = logging.getLogger(__name__)

Value = TypeVar("Value")

_IDENTITY = "identity"
# Folders of the cache that are no kept results.
_NOT_KEPT = ("wheels", "models")
_SUFFIXES = (".json", ".safetensors")


class _Kept(TypedDict):
    """A file of `cached_values`."""

    identity: Object
    result: Object


def cached_values(
    kind: str,
    identity: Mapping[str, Any],
    code: tuple[str, ...],
    schema: type[Schema],
    compute: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Plain values that follow from `identity` and the present software versions.

    Args:
        kind: folder in the cache directory.
        identity: plain values that the result depends on: model, protocol, digest of the text.
        code: names of the modules that compute it (see `permllm.runs.code`).
        schema: of the result.
        compute: called where nothing is kept yet, or what is kept is not what was written.
    """
    text = json.dumps(dict(identity), sort_keys=True)

    def write(file: Path, result: dict[str, Any]) -> None:
        write_record(file, {"identity": dict(identity), "versions": versions(), "result": result})

    def read(file: Path) -> dict[str, Any]:
        kept = read_json(file, _Kept)
        if kept["identity"] != json.loads(text):
            raise DataError(f"{file} is of something else")
        validated(str(file), kept["result"], schema)
        return dict(kept["result"])

    return _cached(_file(kind, identity, code, ".json"), compute, read, write)


def cached_tensors(
    kind: str, identity: Mapping[str, Any], code: tuple[str, ...], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`cached_values` for tensors by name, kept exactly, on the CPU."""
    text = json.dumps(dict(identity), sort_keys=True)

    def write(file: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(file, tensors, {_IDENTITY: text})

    def read(file: Path) -> dict[str, Tensor]:
        _, metadata, _ = read_header(file)
        if metadata.get(_IDENTITY) != text:
            raise DataError(f"{file} is of something else")
        return read_tensors(file)

    return _cached(_file(kind, identity, code, ".safetensors"), compute, read, write)


def clear_cache() -> None:
    """Remove what processes that were killed were writing into the cache: a target can be as large as a model."""
    for scratch in cache_directory().glob("*/.*"):
        name = scratch_of(scratch)
        if name and scratch.is_file():
            try:
                with FileLock((scratch.parent / name).with_suffix(".lock"), timeout=0):
                    scratch.unlink(missing_ok=True)
            except Timeout:
                continue  # a living one is writing it


def digest_of(tensor: Tensor) -> str:
    """sha256 of a CPU tensor's values, shape and dtype."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.contiguous().numpy().tobytes()).hexdigest()


def _trim(kept: Path) -> None:
    """Forget what was longest not used where the results take more than PERMLLM_CACHE_GB, in 10^9 bytes."""
    bound = cache_bound()
    if bound is None:
        return
    over = -bound
    found: list[tuple[float, int, Path]] = []
    for file in cache_directory().glob("*/[!.]*"):
        if file.suffix in _SUFFIXES and file.parent.name not in _NOT_KEPT:
            with suppress(FileNotFoundError):  # another process has removed it
                found.append((file.stat().st_mtime, file.stat().st_size, file))
                over += found[-1][1]
    for _, size, file in sorted(found):
        if over > 0 and file != kept:
            with suppress(Timeout, FileNotFoundError), FileLock(file.with_suffix(".lock"), timeout=0):
                file.unlink()
                over -= size


def _file(kind: str, identity: Mapping[str, Any], code: tuple[str, ...], suffix: str) -> Path:
    key = json.dumps({"identity": dict(identity), "versions": versions(), "code": code_digest(*code)}, sort_keys=True)
    return cache_directory() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"


def _cached(
    file: Path, compute: Callable[[], Value], read: Callable[[Path], Value], write: Callable[[Path, Value], None]
) -> Value:
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if file.is_file():
            try:
                value = read(file)
                os.utime(file)
                return value
            except DataError as error:
                log.warning("%s: computing it again", error)
                file.unlink(missing_ok=True)
        result = compute()
        try:
            write(file, result)
        except DataError as error:
            # A full disk must not cost a job what it has just computed.
            log.warning("not kept for other jobs: %s", error)
        else:
            _trim(file)
        return result
