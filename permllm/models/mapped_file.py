"""Safetensors files as tensors that lie in them: a page is in memory from when it is read until it is let go."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from permllm.errors import DataError
from permllm.models.tensor_file import TYPES, advise, read_header

# The module has a name for it from Python 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_DTYPES = {name: dtype for dtype, name in TYPES.items()}


class MappedFile:
    """A safetensors file whose tensors are views of it. What is written to them is this process's own and never reaches it.

    Args:
        file: with the tensors.

    Attributes:
        names: of its tensors.

    Raises:
        DataError: it is none, or truncated.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        entries, _, self._start = read_header(file)
        self._entries = entries
        self.names = list(entries)
        with open(file, "rb") as stream:
            # Private, and nothing set aside for what is never written: a file may be larger than the memory.
            self._data = mmap.mmap(
                stream.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        self._state = self._present()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, on the CPU, in its format there. Raises DataError where torch has no such format."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise DataError(f"{self.file}: {name} is {entry['dtype']}, which is not known")
        count = math.prod(entry["shape"])
        if not count:
            return torch.empty(entry["shape"], dtype=dtype)
        place = self._start + entry["data_offsets"][0]
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=place).view(entry["shape"])

    def check(self) -> None:
        """Raise DataError where the file is not the one that was opened: reading what was cut off would end the process."""
        if self._present() != self._state:
            raise DataError(f"{self.file} has changed, or is gone, while it was read from")

    def expect(self, names: Iterable[str]) -> None:
        """Have the system read these tensors ahead, if it likes to."""
        self._advise(names, mmap.MADV_WILLNEED)

    def let_go(self, names: Iterable[str]) -> None:
        """Give the memory of these tensors back; who reads one of them again finds it all the same."""
        self._advise(names, mmap.MADV_DONTNEED)

    def _advise(self, names: Iterable[str], advice: int) -> None:
        for name in names:
            first, last = self._entries[name]["data_offsets"]
            advise(self._data, advice, self._start + first, self._start + last)

    def _present(self) -> tuple[int, int, int, int] | None:
        try:
            state = self.file.stat()
        except OSError:
            return None
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
