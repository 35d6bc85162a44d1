"""Headers of safetensors files: the type, shape and place of each tensor."""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path

import torch

from permllm.errors import DataError
from permllm.models.schema import TensorEntry as Entry
from permllm.models.schema import validated

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


def advise(data: mmap.mmap, advice: int, first: int, last: int) -> None:
    """Advise the system on the whole pages between two places of a mapped file: what lies beside them belongs to others."""
    first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        data.madvise(advice, first, last - first)
