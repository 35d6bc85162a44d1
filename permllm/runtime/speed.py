"""Speed of a device: nominal for a card that is named, else measured in a moment."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from permllm.runtime.precision import half_products
from permllm.runtime.timing import interleaved

# Nominal TFLOP/s of dense products in bfloat16 and in float32, GB/s and GB of memory; the share of a speed that is reached.
CARDS = {"l4": (121, 30, 300, 24), "l40s": (362, 92, 864, 48), "rtx4090": (165, 83, 1008, 24), "a100": (312, 19.5, 2039, 80)}
CARDS |= {"h100": (989, 67, 3350, 80), "h200": (989, 67, 4800, 141), "b200": (2250, 75, 8000, 180)}
_SHARE = 0.6


class Speed(NamedTuple):
    """Operations a second of products by their dtype, and bytes that move a second."""

    rates: dict[torch.dtype, float]
    moved: float


def speed_of(card: str | None, device: torch.device, dtypes: Collection[torch.dtype]) -> Speed:
    """Return the speed of a card, or where it is None the speed of the device, for products in each of the dtypes."""
    if card:
        half, single, moved, _ = CARDS[card]
        return Speed(
            {dtype: _SHARE * 1e12 * (half if dtype.itemsize == 2 else single) for dtype in dtypes}, _SHARE * 1e9 * moved
        )
    size = 1024 if device.type == "cpu" else 8192
    square, copied = partial(torch.ones, size, size, device=device), torch.ones(size, size, device=device)
    works: dict[Any, Any] = {dtype: partial(nn.functional.linear, *[square(dtype=dtype)] * 2) for dtype in dtypes}
    with half_products(torch.bfloat16, device):
        times: dict[Any, list[float]] = interleaved(works | {"copy": copied.clone}, 3, device)
    return Speed({dtype: 2 * size**3 / min(times[dtype]) for dtype in dtypes}, 2 * copied.nbytes / min(times["copy"]))
