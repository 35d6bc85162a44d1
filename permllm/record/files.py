"""Write files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from permllm.errors import DataError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a scratch path in the same folder, then move it to `path`. What is no file is written to as it is.

    Who may read the file follows from the process's umask.

    Raises:
        DataError: there is no space, or the folder cannot be written; nothing half-written is left.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    made = False
    try:
        if path.exists() and not path.is_file():  # a device, a pipe: it must not be replaced by a file
            write(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        made = True
        mode = scratch.stat().st_mode
        write(scratch)
        scratch.chmod(mode)  # safetensors makes a file of its own
        os.replace(scratch, path)
        made = False
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        # torch.save says "unexpected pos" when a write falls short.
        if number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in ("No space left", "unexpected pos")):
            raise DataError(f"no space left to write {path}") from error
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        if made:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_atomically(path, lambda scratch: _write(scratch, text))


def with_block(document: str, begin: str, end: str, block: str) -> str:
    """The document with what stands between two markers replaced. Raises ValueError when a marker is missing."""
    head, rest = document.split(begin, 1)
    _, tail = rest.split(end, 1)
    return head + begin + block + end + tail


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, keys in their order."""
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda scratch: save_file(contiguous, scratch, metadata))


def write_torch(path: Path, state: Any) -> None:
    """Write a training state with `torch.save`."""
    write_atomically(path, lambda scratch: torch.save(state, scratch))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
