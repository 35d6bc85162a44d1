"""Whether a safetensors file is whole: nothing missing at the end, and what it holds is what was written."""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.errors import DataError

CHECKSUMS = "crc32"


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes as safetensors stores them."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def checksums_metadata(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Metadata of a safetensors file: the checksum of each tensor, which `check_file` compares."""
    return {CHECKSUMS: json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})}


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins.

    Raises:
        DataError: it has none.
    """
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < 100_000_000 else None
        if isinstance(header, dict):
            return header, 8 + length
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{file} has no readable safetensors header: it is truncated or something else") from error
    raise DataError(f"{file} has no readable safetensors header: it is truncated or something else")


def check_file(file: Path) -> None:
    """Raise DataError when a safetensors file is truncated or a tensor is not what was written; the message names the tensor.

    Contents are compared only where the file has checksums, as ours do.
    """
    header, start = read_header(file)
    metadata = header.pop("__metadata__", None) or {}
    size = file.stat().st_size
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
    for name, entry in entries:
        if start + entry["data_offsets"][1] > size:
            raise DataError(f"{file} is truncated: it ends before the end of {name}")
    expected = json.loads(metadata.get(CHECKSUMS, "{}"))
    if not expected:
        return
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for name, entry in entries:
                first, last = entry["data_offsets"]
                part = view[start + first : start + last]
                found = zlib.crc32(part)
                part.release()
                if name in expected and found != expected[name]:
                    raise DataError(f"{file} is corrupt: {name} is not what was written")
        finally:
            view.release()
