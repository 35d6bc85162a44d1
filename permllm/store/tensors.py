"""Permutations, masks, weights and training states, in memory and as files."""

from __future__ import annotations

import json
import math
import zipfile
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from permllm.errors import DataError, first_line
from permllm.store.files import MASKS, PERMUTATIONS, WEIGHTS, check_sha256, replaced

_SHAPES = "shapes"
# Numbers of a layer by channel group, and their key in the metadata of its file.
_NUMBERS = ("retained", "moved", "output_error")
_FIGURES = "figures"


def packed_mask(mask: Tensor) -> Tensor:
    """Pack a CPU mask as uint8 `(bytes,)`, row by row, with the first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def unpacked_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack a mask of `packed_mask` as bool."""
    mask = np.unpackbits(bits.numpy(), count=math.prod(shape))
    return torch.from_numpy(mask.view(bool)).view(*shape)


class PackedMasks(UserDict[str, Tensor]):
    """CPU masks by name with one bit for each entry, in memory or in a file.

    `masks[name]` is a copy. A changed mask must be set again.
    """

    data: dict[str, Any]  # by name: the bits or a function that reads them, and the shape

    def __getitem__(self, name: str) -> Tensor:
        return unpacked_mask(*self.packed(name))

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self.set_packed(name, packed_mask(mask), mask.shape)

    def __getstate__(self) -> dict[str, Any]:
        # The process that gets the masks may not have the files.
        return {"data": {name: self.packed(name) for name in self}}

    def packed(self, name: str) -> tuple[Tensor, torch.Size]:
        """Return the bits of a mask, as `packed_mask` packs them, and its shape."""
        bits, shape = self.data[name]
        return bits if isinstance(bits, Tensor) else bits(), shape

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of all masks, `(C_out, C_in)`, by name."""
        return {name: shape for name, (_, shape) in self.data.items()}

    def take(self, other: PackedMasks) -> None:
        """Add the masks of another collection without unpacking them."""
        self.data |= other.data

    def set_packed(
        self, name: str, bits: Tensor | Callable[[], Tensor], shape: Sequence[int]
    ) -> None:
        """Set a mask by its bits, or by a function that reads them, and its shape."""
        self.data[name] = bits, torch.Size(shape)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors on any device as a safetensors file, with at most one entry of metadata."""
    held = {}
    storages = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        held[name] = value.clone() if storage in storages else value
        storages.add(storage)
    with replaced(path) as scratch:
        # safetensors writes several entries of metadata in random order. With one entry the same
        # run always gives the same bytes.
        save_file(held, scratch, dict(metadata or {"format": "pt"}))


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file.

    Raises DataError, which names the file, if the file or a tensor in it cannot be read.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU; errors as `opened`."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, on the CPU; errors as `opened`."""
    # The file is closed again, because an open file keeps all tensors in memory that were read.
    with opened(path) as file:
        return file.get_tensor(name)


def tensor_formats(path: Path) -> dict[str, str]:
    """Return the format of each tensor of a safetensors file, such as `F32`; errors as `opened`."""
    with opened(path, "numpy") as file:  # "pt" would reserve memory for the whole file
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def load_permutations(path: Path) -> dict[str, Tensor]:
    """Return the permutations of a file by name, int64 `(C_in,)`.

    Raises DataError, which names the file and the tensor, if one is no permutation.
    """
    permutations = load_tensors(path)
    for name, permutation in permutations.items():
        is_integer = permutation.dtype in (torch.int64, torch.int32)
        if not is_integer or permutation.sort().values.tolist() != [*range(permutation.numel())]:
            raise DataError(f"{path}: {name} is no permutation of its channels")
    return {name: permutation.long() for name, permutation in permutations.items()}


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write packed masks by linear, with their shapes in the metadata.

    A mask is bool `(C_out, C_in)`, in the original channel order; True: the weight is kept.
    """
    packed = masks if isinstance(masks, PackedMasks) else PackedMasks(masks)
    shapes = json.dumps(packed.shapes())
    save_tensors(path, {name: packed.packed(name)[0] for name in packed}, {_SHAPES: shapes})


def load_masks(path: Path) -> PackedMasks:
    """Return the masks of `save_masks`. Each access to a mask reads it from the file."""
    with opened(path) as file:
        shapes = json.loads(file.metadata()[_SHAPES])
    masks = PackedMasks()
    for name, shape in shapes.items():
        masks.set_packed(name, partial(load_tensor, path, name), shape)
    return masks


def save_state(path: Path, state: Any) -> None:
    """Write a training state with `torch.save`."""
    with replaced(path) as scratch:
        torch.save(state, scratch)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a training state of tensors and plain values, without running code from the file.

    Raises DataError, which names the file, if it is damaged or has something else.
    """
    try:
        # torch does not compare the checksums of its archive.
        with zipfile.ZipFile(path) as archive:
            if changed := archive.testzip():
                raise DataError(f"{changed} was changed")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise many classes
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


@dataclass
class PrunedLayer:
    """Result of pruning a decoder layer.

    Attributes:
        permutations: permutations by channel group, int64 `(C_in,)`.
        masks: masks by linear, bool `(C_out, C_in)`, in the original channel order.
        weights: changed weights by linear, `(C_out, C_in)`; empty: the kept weights are dense ones.
        retained: share of the saliency retained, by channel group.
        moved: share of the channels that moved, by channel group.
        output_error: output error, by channel group.
    """

    permutations: dict[str, Tensor] = field(default_factory=dict)
    masks: PackedMasks = field(default_factory=PackedMasks)
    weights: dict[str, Tensor] = field(default_factory=dict)
    retained: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)


def mask_name(path: str) -> str:
    """Return the name of the packed mask of a linear in a layer's file."""
    return f"mask of {path}"


def weight_name(path: str) -> str:
    """Return the name of the changed weight of a linear in a layer's file."""
    return f"weight of {path}"


def save_layer(path: Path, layer: PrunedLayer) -> None:
    """Write a layer, so that a run can resume after it."""
    tensors = {
        f"permutation of {name}": permutation for name, permutation in layer.permutations.items()
    }
    tensors |= {mask_name(name): layer.masks.packed(name)[0] for name in layer.masks}
    tensors |= {weight_name(name): weight for name, weight in layer.weights.items()}
    figures: dict[str, Any] = {name: getattr(layer, name) for name in _NUMBERS}
    figures[_SHAPES] = layer.masks.shapes()
    save_tensors(path, tensors, {_FIGURES: json.dumps(figures)})


def load_layer(path: Path) -> PrunedLayer:
    """Read a layer. Raises DataError, which names the file, if it cannot be read."""
    with opened(path) as file:
        figures = json.loads(file.metadata()[_FIGURES])
    tensors = load_tensors(path)
    layer = PrunedLayer(**{key: figures[key] for key in _NUMBERS})
    layer.permutations = {group: tensors[f"permutation of {group}"] for group in layer.retained}
    for name, shape in figures[_SHAPES].items():
        layer.masks.set_packed(name, tensors[mask_name(name)], shape)
        if weight_name(name) in tensors:
            layer.weights[name] = tensors[weight_name(name)]
    return layer


class PrunedTensors:
    """Pruned model of a run directory. Weights are read one by one.

    `identity` is that of the dense model (`LoadedModel.identity`).

    Attributes:
        permutations: permutations by channel group, int64 `(C_in,)`.
        masks: masks by linear, bool `(C_out, C_in)`, in the original channel order.
        weights_changed: True: the kept weights differ from those of the dense model.
        weight_files: file of each changed weight, by linear.

    Raises:
        DataError: the run pruned another model, a file is missing or has changed, or changed
            weights were not saved (`save_weights=false`).
    """

    def __init__(self, directory: Path, metrics: Mapping[str, Any], identity: str) -> None:
        if metrics["model"] != identity:
            raise DataError(
                f"{directory} was pruned from {metrics['model']}, and this model is {identity}"
            )
        for name, digest in metrics.get("sha256", {}).items():
            check_sha256(directory, name, digest)
        sparsity = metrics["sparsity"]
        self.weights_changed: bool = sparsity["weights_changed"]
        self.permutations = load_permutations(directory / PERMUTATIONS)
        self.masks = load_masks(directory / MASKS)
        files = sorted(directory.glob(f"{WEIGHTS}/*.safetensors"))
        self.weight_files = {name: file for file in files for name in tensor_formats(file)}
        if self.weights_changed and not files:
            raise DataError(f"{directory} has no weights: it was run with save_weights=false")

    def weight(self, path: str, dense: Tensor) -> Tensor:
        """Return the pruned weight of a linear, original channel order, on `dense`'s device."""
        mask = self.masks[path].to(dense.device)
        new = load_tensor(self.weight_files[path], path) if self.weights_changed else dense
        return torch.where(mask, new.to(dense), 0.0)
