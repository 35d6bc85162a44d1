"""Safetensors files, written one tensor at a time, and checked: whole, and holding what was written.

The library's own writer needs a whole shard in memory, twice. The format is a JSON header with each tensor's type, shape and
place, then the bytes; its metadata carry a checksum of each tensor here, which other readers leave alone.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.errors import DataError

CHECKSUMS = "crc32"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_file(file: Path, planned: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """Write a safetensors file.

    Args:
        file: to write.
        planned: shape and dtype of each tensor, by name; may be on the meta device.
        make: the tensor, which is asked for once, and let go before the next.
    """
    # Wide types first, as the library does: then every tensor begins at a multiple of its type's size.
    names = sorted(planned, key=lambda name: (-planned[name].element_size(), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + planned[name].numel() * planned[name].element_size()
        shape = list(planned[name].shape)
        entries[name] = {"dtype": _TYPES[planned[name].dtype], "shape": shape, "data_offsets": [start, end]}

    def header(checksums: dict[str, str]) -> bytes:
        metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums)}
        text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    with open(file, "wb") as stream:
        stream.write(header(dict.fromkeys(names, _hexadecimal(0))))
        checksums = {}
        for name in names:
            tensor = make(name)
            if tensor.shape != planned[name].shape or tensor.dtype != planned[name].dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, which was not planned")
            data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            checksums[name] = _hexadecimal(zlib.crc32(data))
            stream.write(data)
        stream.seek(0)
        stream.write(header(checksums))  # as long as the first


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
    end = start + max((entry["data_offsets"][1] for _, entry in entries), default=0)
    if size > end:
        raise DataError(f"{file} is corrupt: {size - end} bytes follow its last tensor")
    expected = json.loads(metadata.get(CHECKSUMS, "{}"))
    if not expected:
        return
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for name, entry in entries:
                first, last = entry["data_offsets"]
                part = view[start + first : start + last]
                found = _hexadecimal(zlib.crc32(part))
                part.release()
                if name in expected and found != expected[name]:
                    raise DataError(f"{file} is corrupt: {name} is not what was written")
        finally:
            view.release()


def _hexadecimal(number: int) -> str:
    return f"{number:08x}"
