"""Small pictures, as plain values, of the orders and masks that a run directory holds."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from permllm.errors import DataError
from permllm.record.names import MASKS, PERMUTATIONS
from permllm.record.run_tensors import mask_names, mask_reader, read_orders

NOT_KEPT = "not kept with this record"
# A prime, so that the points of a channel count that is a power of two do not all have the same place in their group of M.
POINTS = 997
CROP = 96


def pictures(directory: Path) -> dict[str, Any]:
    """Orders and masks of the first, the middle and the last layer, as far as the run's directory has them.

    Returns:
        `permutations`: for each channel group its `name`, the number of `channels`, the share `moved`, and `points`: for i
        below their number n (at most `POINTS`) the original channel at position `i * channels // n` of the permuted order.
        `masks`: for each linear its `name`, `shape`, and `bits`: the upper left corner, `rows` x `columns` (at most `CROP`
        each) in original channel order, one bit a weight in row-major order, 1 = kept, in base64. Or, for either of the two,
        a text that says why there is none.
    """
    return {
        "permutations": _pictures(directory / PERMUTATIONS, _orders),
        "masks": _pictures(directory / MASKS, _crops),
    }


def _pictures(file: Path, read: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]] | str:
    if not file.is_file():
        return NOT_KEPT
    try:
        return read(file)
    except DataError as error:
        return str(error).replace(f"{file.parent}/", "")


def _orders(file: Path) -> list[dict[str, Any]]:
    found = []
    orders = read_orders(file)
    for name in _of_three_layers(orders):
        order = orders[name].numpy()
        channels = len(order)
        count = min(channels, POINTS)
        points = order[np.arange(count) * channels // count]
        moved = float((order != np.arange(channels)).mean())
        found.append({"name": name, "channels": channels, "moved": moved, "points": points.tolist()})
    return found


def _crops(file: Path) -> list[dict[str, Any]]:
    read = mask_reader(file)
    found = []
    for name in _of_three_layers(mask_names(file)):
        mask = read(name).numpy()
        crop = mask[:CROP, :CROP]
        bits = base64.b64encode(np.packbits(crop).tobytes()).decode()
        rows, columns = crop.shape
        found.append({"name": name, "shape": list(mask.shape), "rows": rows, "columns": columns, "bits": bits})
    return found


def by_layer(names: Iterable[str]) -> dict[int, list[str]]:
    """Names of channel groups or linears by the index of their decoder layer, -1 for those that have none."""
    layers: dict[int, list[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(int(number[1]) if number else -1, []).append(name)
    return layers


def _of_three_layers(names: Iterable[str]) -> list[str]:
    """The names of the first, middle and last layer, attention before the rest."""
    layers = by_layer(names)
    order = sorted(layers)
    chosen = dict.fromkeys([order[0], order[len(order) // 2], order[-1]] if order else [])
    return [name for layer in chosen for name in sorted(layers[layer], key=lambda name: ("attn" not in name, name))]
