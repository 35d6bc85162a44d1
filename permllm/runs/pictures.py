"""Small pictures of the orders and masks that a run directory holds, as PNG; torch is imported where there are some."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permllm.errors import DataError
from permllm.runs.names import MASKS, PERMUTATIONS

NOT_KEPT = "not kept with this record"
# A prime, so that the points of a channel count that is a power of two do not all have the same place in their group of M.
POINTS = 997
SIDE = 192
CROP = 96
_INK = (63, 127, 196)  # seen on white and on black


def pictures(directory: Path) -> dict[str, list[dict[str, str]] | str]:
    """Orders and masks of the first, the middle and the last layer, as far as the run's directory has them.

    Returns:
        `permutations`, for each channel group, and `masks`, for each linear: its `name`, `what` is drawn, and the `image` as a
        data URI. Position in the permuted order is to the right and original position upwards, of at most `POINTS` channels;
        a mask is its upper left corner, at most `CROP` x `CROP` weights in original channel order, a pixel each, kept ones
        inked. Or, for either of the two, a text that says why there is none.
    """
    return {"permutations": _drawn(directory / PERMUTATIONS, _orders), "masks": _drawn(directory / MASKS, _crops)}


# Of some tensors: the name, what is drawn, its pixels.
_Pictures = Iterator[tuple[str, str, NDArray[Any]]]


def _drawn(file: Path, read: Callable[[Path], _Pictures]) -> list[dict[str, str]] | str:
    if not file.is_file():
        return NOT_KEPT
    try:
        return [{"name": name, "what": what, "image": _png(pixels)} for name, what, pixels in read(file)]
    except DataError as error:
        return str(error).replace(f"{file.parent}/", "")


def _orders(file: Path) -> _Pictures:
    from permllm.runs.run_tensors import read_orders

    orders = read_orders(file)
    for name in _of_three_layers(orders):
        order = orders[name].numpy()
        channels, side = len(order), min(len(order), SIDE)
        count = min(channels, POINTS)
        places = np.arange(count) * channels // count
        pixels = np.zeros((side, side), dtype=bool)
        pixels[side - 1 - order[places] * side // channels, places * side // channels] = True
        some = f", {count} of them drawn" if count < channels else ""
        yield name, f"{channels} channels{some}, {(order != np.arange(channels)).mean():.1%} moved", pixels


def _crops(file: Path) -> _Pictures:
    from permllm.runs.run_tensors import mask_names, mask_reader

    read = mask_reader(file)
    for name in _of_three_layers(mask_names(file)):
        mask = read(name).numpy()
        crop = mask[:CROP, :CROP]
        yield name, f"{crop.shape[0]} x {crop.shape[1]} of {mask.shape[0]} x {mask.shape[1]}", crop


def _png(bits: NDArray[Any]) -> str:
    from PIL import Image

    picture = Image.fromarray(bits.astype(np.uint8))
    picture.putpalette((0, 0, 0, *_INK))
    stream = io.BytesIO()
    picture.save(stream, "PNG", bits=1, transparency=0)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


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
