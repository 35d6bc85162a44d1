"""Speed of a device: nominal for the name of a card, or else measured."""

from collections.abc import Collection

import torch
from torch.utils.benchmark import Timer

# Operations per second of a device, by dtype.
Speed = dict[torch.dtype, float]

# For each card: nominal TFLOP/s of dense products in bfloat16 and float32, and GB of memory.
CARDS = {
    "l4": (121, 30, 24),
    "l40s": (362, 92, 48),
    "rtx4090": (165, 83, 24),
    "a100": (312, 19.5, 80),
    "h100": (989, 67, 80),
    "h200": (989, 67, 141),
    "b200": (2250, 75, 180),
}
# Share of the nominal speed that we expect.
_SHARE = 0.6


def speed_of(card: str | None, device: torch.device, dtypes: Collection[torch.dtype]) -> Speed:
    """Return the expected speed of a card for products in each dtype; None: measure the device."""
    speed = {}
    threads = torch.get_num_threads()
    size = 1024 if device.type == "cpu" else 8192
    for dtype in dtypes:
        if card:
            half, single, _ = CARDS[card]
            speed[dtype] = _SHARE * 1e12 * (half if dtype.itemsize == 2 else single)
            continue
        square = torch.ones(size, size, device=device, dtype=dtype)
        product = Timer("square @ square", globals={"square": square}, num_threads=threads)
        speed[dtype] = 2 * size**3 / product.blocked_autorange().median
    return speed
