"""Permutations, masks, weights and training states as files, written by safetensors and torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from permllm.errors import DataError, first_line
from permllm.runs.files import replaced
from permllm.runs.masks import PackedMasks, is_permutation

_SHAPES = "shapes"
# What `safe_open` and `load_file` raise of a file that is damaged, missing, larger than the memory or something else.
_UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, RuntimeError)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file.

    Args:
        path: of the file.
        tensors: by name, on any device.
        metadata: texts by name.
    """
    held, storages = {}, set()
    for name, tensor in tensors.items():
        held[name] = tensor.detach().cpu().contiguous()
        storage = held[name].untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() > held[name].nbytes:
            held[name] = held[name].clone()  # safetensors refuses tensors that share memory
        storages.add(storage.data_ptr())
    with replaced(path) as scratch:
        # One text alone: safetensors writes several in any order, and the same run must give the same bits.
        save_file(held, scratch, dict(metadata or {"format": "pt"}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU. Raises DataError, which names the file, where it cannot be read."""
    try:
        return load_file(path)
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def load_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, on the CPU; errors as `load_tensors`."""
    # Opened anew each time: a file that stays mapped stays in memory, all that was ever read of it.
    try:
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({name}): {first_line(error)}") from error


def load_metadata(path: Path) -> dict[str, str]:
    """Read the texts of a safetensors file; errors as `load_tensors`."""
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def tensor_formats(path: Path) -> dict[str, str]:
    """Return the format of each tensor of a safetensors file, such as `F32`; errors as `load_tensors`."""
    try:
        with safe_open(path, framework="numpy") as opened:  # which reserves no memory for the whole file
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def load_orders(path: Path) -> dict[str, Tensor]:
    """Read permutations, int64 `(C_in,)` by channel group.

    Raises:
        DataError: the file cannot be read, or one of its tensors is no permutation.
    """
    orders = load_tensors(path)
    for name, order in orders.items():
        check_order(f"{path}: {name}", order)
    return {name: order.long() for name, order in orders.items()}


def check_order(where: str, order: Tensor) -> None:
    """Raise DataError, which begins with `where`, unless a tensor is a permutation: int64 or int32, `(C_in,)`."""
    if order.dtype not in (torch.int64, torch.int32) or not is_permutation(order):
        raise DataError(f"{where} is no permutation of its channels")


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks with one bit a weight.

    Args:
        path: of a safetensors file. Each tensor is uint8, the mask in row-major order, eight weights a byte, the first in the
            highest bit. The shapes stand in the metadata.
        masks: bool `(C_out, C_in)` by linear, original channel order, True = kept.
    """
    packed = masks if isinstance(masks, PackedMasks) else PackedMasks(masks)
    shapes = {name: list(packed.shape(name)) for name in packed}
    save_tensors(path, {name: packed.packed(name)[0] for name in packed}, {_SHAPES: json.dumps(shapes)})


def load_masks(path: Path) -> PackedMasks:
    """Return the masks of `save_masks`, bool `(C_out, C_in)` by linear; each is read from the file when it is asked for."""
    masks = PackedMasks()
    try:
        for name, shape in json.loads(load_metadata(path)[_SHAPES]).items():
            masks.set_packed(name, partial(load_tensor, path, name), shape)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} holds no masks with their shapes") from error
    return masks


def save_state(path: Path, state: Any) -> None:
    """Write a training state with `torch.save`."""
    with replaced(path) as scratch:
        torch.save(state, scratch)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a training state: tensors and plain values alone, so that no code of a stranger runs.

    Args:
        path: of the file.
        device: of its tensors.

    Raises:
        DataError: the file is damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums of its archive
            changed = archive.testzip()
        if changed:
            raise DataError(f"{path}: {changed} was changed")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state
    except (torch.OutOfMemoryError, MemoryError, DataError):
        raise
    except Exception as error:  # each library has its own for a file that is something else
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
