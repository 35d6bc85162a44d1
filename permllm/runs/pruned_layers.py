"""Pruned layers in files of their own, so that a run that was stopped continues after the last one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from permllm.errors import DataError
from permllm.runs.masks import PackedMasks
from permllm.runs.tensors import load_metadata, load_tensors, save_tensors

_FIGURES = "figures"


@dataclass
class PrunedLayer:
    """Result of pruning a decoder layer.

    Attributes:
        orders: int64 `(C_in,)` by group.
        masks: bool `(C_out, C_in)` by linear, original channel order.
        weights: `(C_out, C_in)` by linear, if they differ from the dense ones under the masks; else empty.
        retained: share of the saliency retained, by group.
        moved: share of the channels that moved, by group.
        output_error: by group.
    """

    orders: dict[str, Tensor] = field(default_factory=dict)
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
    """Write a layer."""
    tensors = {f"order of {name}": order for name, order in layer.orders.items()}
    tensors |= {mask_name(name): layer.masks.packed(name)[0] for name in layer.masks}
    tensors |= {weight_name(name): weight for name, weight in layer.weights.items()}
    figures = {
        "shapes": {name: list(layer.masks.shape(name)) for name in layer.masks},
        "retained": layer.retained,
        "moved": layer.moved,
        "output_error": layer.output_error,
    }
    save_tensors(path, tensors, {_FIGURES: json.dumps(figures)})


def load_layer(path: Path) -> PrunedLayer:
    """Read a layer. Raises DataError, which names the file, where it cannot be read."""
    tensors = load_tensors(path)
    try:
        figures = json.loads(load_metadata(path)[_FIGURES])
        layer = PrunedLayer(**{key: figures[key] for key in ("retained", "moved", "output_error")})
        layer.orders = {group: tensors[f"order of {group}"] for group in layer.retained}
        for name, shape in figures["shapes"].items():
            layer.masks.set_packed(name, tensors[mask_name(name)], shape)
            if weight_name(name) in tensors:
                layer.weights[name] = tensors[weight_name(name)]
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} holds no pruned layer") from error
    return layer
