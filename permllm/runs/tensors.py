"""Tensors and training states, written whole or not at all (`permllm.runs.files`)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.errors import DataError, first_line
from permllm.runs.files import write_atomically
from permllm.runs.schema import Schema, validated
from permllm.runs.tensor_file import write_file


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    make: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors as safetensors, each with a checksum (`permllm.runs.tensor_file`).

    Args:
        path: of the file.
        tensors: by name; where there is a `make`, their shapes and dtypes alone.
        metadata: texts that are kept beside the checksums.
        make: gives one tensor at a time, where all of them are more than the memory should hold.
    """
    write_atomically(path, lambda scratch: write_file(scratch, tensors, make or tensors.__getitem__, metadata))


def read_torch(path: Path, schema: type[Schema], device: torch.device) -> Schema:
    """What `write_torch` wrote, nothing unpickled but tensors and plain values.

    Args:
        path: of the file.
        schema: what it must hold.
        device: where its tensors go.

    Raises:
        DataError: it was changed, is cut short or something else, or a field is not as the schema says.
    """
    try:
        # torch leaves the checksums of its archive alone.
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        state = None if changed else torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a library makes of a file that is something else
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if changed:
        raise DataError(f"{path} is corrupt: {changed} is not what was written")
    return validated(str(path), state, schema)


def write_torch(path: Path, state: Any) -> None:
    """Write a training state with `torch.save`."""
    write_atomically(path, lambda scratch: torch.save(state, scratch))
