"""Safetensors files, written one tensor at a time, and checked: whole, and holding what was written.

The library's own writer needs a whole shard in memory, twice. The format is a JSON header with each tensor's type, shape and
place, then the bytes; its metadata carry a checksum of each tensor here, which other readers leave alone.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from permllm.errors import DataError
from permllm.runs.names import CHECKSUM
from permllm.runs.schema import TensorEntry as Entry
from permllm.runs.schema import validated

_LONGEST_HEADER = 100_000_000
# What a header calls the formats that are written.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Bits of a number in each format that there is; of others the places are not known.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def write_file(
    file: Path, planned: Mapping[str, Tensor], make: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        file: to write.
        planned: shape and dtype of each tensor, by name; may be on the meta device.
        make: the tensor, which is asked for once, and let go before the next.
        metadata: texts that are kept beside the checksums.
    """
    # Wide types first, as the library does: then every tensor begins at a multiple of its type's size.
    names = sorted(planned, key=lambda name: (-planned[name].element_size(), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + planned[name].numel() * planned[name].element_size()
        shape = list(planned[name].shape)
        entries[name] = {"dtype": TYPES[planned[name].dtype], "shape": shape, "data_offsets": [start, end]}

    def header(checksums: dict[str, str]) -> bytes:
        kept = {"format": "pt", **(metadata or {}), CHECKSUM: json.dumps(checksums)}
        text = json.dumps({"__metadata__": kept} | entries, separators=(",", ":")).encode()
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


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The header of a safetensors file.

    Returns:
        The entry of each tensor by name, in the order of their places; the metadata; and where the data begins.

    Raises:
        DataError: it has none, or its entries are no places in one piece, one after the other, in a file of this size.
    """
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < _LONGEST_HEADER else None
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist") from error
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise DataError(f"{file} has no readable safetensors header: it is truncated or something else") from error
    if not isinstance(header, dict):
        raise DataError(f"{file} has no readable safetensors header: it is truncated or something else")
    metadata = validated(f"{file}: its metadata", header.pop("__metadata__", None) or {}, dict[str, str])
    entries = validated(f"{file}: its header", header, dict[str, Entry])
    ordered = dict(sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"]))
    start, size, end = 8 + length, file.stat().st_size, 0
    for name, entry in ordered.items():
        first, last = entry["data_offsets"]
        if start + last > size:
            raise DataError(f"{file} is truncated: it ends before the end of {name}")
        if first != end or (last - first) * 8 != math.prod(entry["shape"]) * _BITS.get(entry["dtype"], -1):
            raise DataError(f"{file} is corrupt: {name} is not where its header says")
        end = last
    if size > start + end:
        raise DataError(f"{file} is corrupt: {size - start - end} bytes follow its last tensor")
    return ordered, metadata, start


def check_file(file: Path) -> bool:
    """Raise DataError when a safetensors file is truncated or a tensor is not what was written; the message names the tensor.

    Returns:
        Whether contents were compared too: only files of ours have checksums.
    """
    entries, metadata, start = read_header(file)
    if CHECKSUM not in metadata:
        return False
    try:
        stated = json.loads(metadata[CHECKSUM])
    except ValueError as error:
        raise DataError(f"{file} is corrupt: its checksums cannot be read") from error
    expected = validated(f"{file}: its checksums", stated, dict[str, str])
    if expected.keys() != entries.keys():
        raise DataError(f"{file} is corrupt: its checksums are of other tensors")
    if start == file.stat().st_size:
        return True
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                part = view[start + first : start + last]
                found = _hexadecimal(zlib.crc32(part))
                part.release()
                advise(data, mmap.MADV_DONTNEED, start + first, start + last)
                if found != expected[name]:
                    raise DataError(f"{file} is corrupt: {name} is not what was written")
        finally:
            view.release()
    return True


def advise(data: mmap.mmap, advice: int, first: int, last: int) -> None:
    """Advise the system on the whole pages between two places of a mapped file: what lies beside them belongs to others."""
    first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        data.madvise(advice, first, last - first)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU.

    Raises:
        DataError: it is missing, no safetensors file, or not as it was written (`check_file`).
    """
    check_file(file)
    with _readable(file):
        return load_file(file)


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, on the CPU, as it is there. Raises DataError where it cannot be read."""
    # Opened anew each time: a file that stays mapped stays in memory, all that was ever read of it.
    with _readable(file), safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _hexadecimal(number: int) -> str:
    return f"{number:08x}"
