"""Results that several jobs need are computed once: kept in the cache directory under a digest of what they follow from.

A lock for each digest lets jobs that run at the same time, in any processes that share the folder, wait for the first of them
instead of computing the same. Kept files are never changed, and one that was is computed again; deleting the folder costs time
and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import TypedDict

from permllm.errors import DataError
from permllm.record.cache_folder import cache_directory
from permllm.record.environment import versions
from permllm.record.files import has_checksum, read_json, scratch_of, write_record, write_tensors
from permllm.record.schema import Object, Schema, validated
from permllm.record.tensor_file import CHECKSUM, read_header, read_tensors

log = logging.getLogger(__name__)

Value = TypeVar("Value")

_IDENTITY = "identity"
# Folders of the package whose code decides what is kept.
_CODE = ("calibration", "data", "evaluation", "models", "pruning")


class _Kept(TypedDict):
    """A file of `cached_values`."""

    identity: Object
    result: Object


def cached_values(
    kind: str, identity: Mapping[str, Any], schema: type[Schema], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Plain values that follow from `identity` and the present software versions.

    Args:
        kind: folder in the cache directory.
        identity: plain values that the result depends on: model, protocol, digest of the text.
        schema: of the result.
        compute: called where nothing is kept yet, or what is kept is not what was written.
    """
    text = json.dumps(dict(identity), sort_keys=True)

    def write(file: Path, result: dict[str, Any]) -> None:
        write_record(file, {"identity": dict(identity), "versions": versions(), "result": result})

    def read(file: Path) -> dict[str, Any]:
        kept = read_json(file, _Kept)
        if kept["identity"] != json.loads(text) or not has_checksum(file):
            raise DataError(f"{file} is of something else, or of an older version")
        validated(str(file), kept["result"], schema)
        return dict(kept["result"])

    return _cached(_file(kind, identity, ".json"), compute, read, write)


def cached_tensors(kind: str, identity: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`cached_values` for tensors by name, kept exactly, on the CPU."""
    text = json.dumps(dict(identity), sort_keys=True)

    def write(file: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(file, tensors, {_IDENTITY: text})

    def read(file: Path) -> dict[str, Tensor]:
        _, metadata, _ = read_header(file)
        if metadata.get(_IDENTITY) != text or CHECKSUM not in metadata:
            raise DataError(f"{file} is of something else, or of an older version")
        return read_tensors(file)

    return _cached(_file(kind, identity, ".safetensors"), compute, read, write)


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


@cache
def code_digest() -> str:
    """sha256 of the code that kept results come from: what an older checkout computed is not taken for what this one would."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(
        [
            package / "pipeline.py",
            package / "runtime" / "precision.py",
            *(file for folder in _CODE for file in (package / folder).rglob("*.py")),
        ]
    ):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _file(kind: str, identity: Mapping[str, Any], suffix: str) -> Path:
    key = json.dumps({"identity": dict(identity), "versions": versions(), "code": code_digest()}, sort_keys=True)
    return cache_directory() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"


def _cached(
    file: Path, compute: Callable[[], Value], read: Callable[[Path], Value], write: Callable[[Path, Value], None]
) -> Value:
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if file.is_file():
            try:
                return read(file)
            except DataError as error:
                log.warning("%s: computing it again", error)
                file.unlink(missing_ok=True)
        result = compute()
        try:
            write(file, result)
        except DataError as error:
            # A full disk must not cost a job what it has just computed.
            log.warning("not kept for other jobs: %s", error)
        return result
