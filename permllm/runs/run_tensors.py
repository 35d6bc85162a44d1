"""The tensors of a run directory: orders, masks and changed weights, written with checksums and read with every check.

A file that another process has written may be of another model, cut short, or changed: what is read here is what a run of
this model leaves, or a `DataError` names the file and the group or linear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from permllm.config import NMPattern
from permllm.errors import DataError
from permllm.runs.masks import PackedMasks, is_permutation, unpacked_mask, violations
from permllm.runs.schema import Positive, validated
from permllm.runs.tensor_file import check_file, read_header, read_tensor, read_tensors
from permllm.runs.tensors import write_tensors

_SHAPES = "shapes"
_Shapes = dict[str, Annotated[list[Positive], Field(min_length=2, max_length=2)]]

TensorReader = Callable[[str], Tensor]


def write_orders(path: Path, orders: Mapping[str, Tensor]) -> None:
    """Write the order of each channel group, int64 `(C_in,)` by the group's name."""
    write_tensors(path, orders)


def read_orders(path: Path, channels: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """The orders of `write_orders`.

    Args:
        path: of the file.
        channels: number of channels of each group of the model, by name; None takes any groups.

    Raises:
        DataError: the file cannot be read or was changed; an order is no permutation; the groups are not the model's.
    """
    orders = read_tensors(path)
    for name, order in orders.items():
        check_order(f"{path}: the permutation of {name}", order)
        orders[name] = order.long()
    if channels is not None:
        _check_names(path, orders, channels)
        for name, count in channels.items():
            if len(orders[name]) != count:
                raise DataError(
                    f"{path}: the permutation of {name} is of {len(orders[name])} channels, and the model has {count}"
                )
    return orders


def check_order(where: str, order: Tensor) -> None:
    """Raise DataError, which begins with `where`, unless a tensor is a permutation: int64 or int32, `(C_in,)`."""
    if order.dtype not in (torch.int64, torch.int32) or not is_permutation(order):
        raise DataError(f"{where} is no permutation of its channels")


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks with one bit a weight.

    Args:
        path: safetensors file; each tensor is uint8, the mask in row-major order, eight weights a byte, the first in the
            highest bit; the shape stands in the metadata.
        masks: bool `(C_out, C_in)` by linear, original channel order, True = kept.
    """
    packed = masks if isinstance(masks, PackedMasks) else PackedMasks(masks)
    shapes = {name: list(packed.shape(name)) for name in packed}
    planned = {
        name: torch.empty(-(-math.prod(shape) // 8), dtype=torch.uint8, device="meta") for name, shape in shapes.items()
    }
    write_tensors(path, planned, {_SHAPES: json.dumps(shapes)}, make=lambda name: packed.packed(name)[0])


def mask_names(path: Path) -> list[str]:
    """The linears of `write_masks`, layer by layer as they were written. Raises DataError where they cannot be read."""
    return list(_shapes(path))


def mask_reader(path: Path, shapes: Mapping[str, tuple[int, int]] | None = None) -> TensorReader:
    """Reads one mask of `write_masks` at a time, bool `(C_out, C_in)` by linear.

    Args:
        path: of the file.
        shapes: of the linears of the model, by name; None takes any linears.

    Raises:
        DataError: the file cannot be read or was changed, or its masks are not those of the linears.
    """
    check_file(path)
    stated = _shapes(path)
    if shapes is not None:
        _check_names(path, stated, shapes)
        for name, shape in shapes.items():
            if tuple(stated[name]) != shape:
                raise DataError(f"{path}: the mask of {name} is {tuple(stated[name])}, and the linear {shape}")

    def read(name: str) -> Tensor:
        return unpacked_mask(read_tensor(path, name), stated[name])

    return read


def read_masks(path: Path) -> PackedMasks:
    """All masks of `write_masks`, bool `(C_out, C_in)` by linear."""
    read = mask_reader(path)
    return PackedMasks((name, read(name)) for name in mask_names(path))


def check_mask(path: Path, name: str, mask: Tensor, order: Tensor, pattern: NMPattern) -> None:
    """Raise DataError unless each group of M of a mask, in the order of its channels, keeps exactly N.

    Args:
        path: of the file that the mask is from.
        name: of the linear.
        mask: bool `(C_out, C_in)`, original channel order.
        order: int64 `(C_in,)`.
        pattern: N:M.
    """
    # Counts take eight bytes a group: some rows at a time.
    rows = mask.split(max(1, (1 << 18) // mask.shape[1]))
    kept = sum(int(part.sum()) for part in rows)
    if kept * pattern.m != mask.numel() * pattern.n or any(violations(part, order, pattern) for part in rows):
        raise DataError(f"{path}: the mask of {name} is not {pattern} in the order of its channels")


def weight_reader(path: Path, shapes: Mapping[str, tuple[int, int]]) -> TensorReader:
    """Reads one changed weight at a time, `(C_out, C_in)` by linear, in the dtype of the run.

    Args:
        path: of the file.
        shapes: of the linears of the model, by name.

    Raises:
        DataError: the file cannot be read or was changed, or its weights are not those of the linears; when a weight is read
            that is not finite.
    """
    check_file(path)
    entries, _, _ = read_header(path)
    _check_names(path, entries, shapes)
    for name, shape in shapes.items():
        if tuple(entries[name]["shape"]) != shape or entries[name]["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise DataError(f"{path}: the weight of {name} is not a floating-point {shape}")

    def read(name: str) -> Tensor:
        weight = read_tensor(path, name)
        if not all(bool(bound.isfinite()) for bound in weight.aminmax()):
            raise DataError(f"{path}: the weight of {name} is not finite")
        return weight

    return read


def _shapes(path: Path) -> dict[str, list[int]]:
    entries, metadata, _ = read_header(path)
    try:
        stated = json.loads(metadata.get(_SHAPES, "null"))
    except ValueError as error:
        raise DataError(f"{path}: the shapes of its masks cannot be read") from error
    shapes: dict[str, list[int]] = validated(f"{path}: the shapes of its masks", stated, _Shapes)
    _check_names(path, entries, shapes)
    for name, (rows, channels) in shapes.items():
        if entries[name]["dtype"] != "U8" or entries[name]["shape"] != [-(-rows * channels // 8)]:
            raise DataError(f"{path}: {name} does not hold the bits of a mask {(rows, channels)}")
    return shapes


def _check_names(path: Path, found: Collection[str], wanted: Collection[str]) -> None:
    lacking = [name for name in wanted if name not in found]
    strange = [name for name in found if name not in wanted]
    if lacking or strange:
        text = f"lacks {lacking[0]}" if lacking else f"holds {strange[0]}, which the model has not"
        raise DataError(f"{path} {text}: it is of another model, or a part of what was written")
