"""Split of an (M-2):M weight into overlapping 2:4 windows, for sparse tensor cores."""

import torch
from torch import Tensor

from permllm.settings.config import NMPattern


def window_count(pattern: NMPattern) -> int | None:
    """Return the number of 2:4 windows in M channels, two channels apart; None: no split exists.

    2:4 is one window, 6:8 are three. Each window has four channels, and 2:4 kernels multiply half
    of them. So the product takes at least (M - 2) / M of the dense time.
    """
    return pattern.n // 2 if pattern.m % 2 == 0 and pattern.n == pattern.m - 2 else None


def stored_share(pattern: NMPattern, bits: int) -> float:
    """Return the bytes of a weight that is stored as 2:4 windows, as a share of the dense ones.

    Each window of four channels stores two values of `bits`, and 2 bits for the place of each.
    A weight that has no split is stored like a dense one.
    """
    windows = window_count(pattern)
    return 1.0 if windows is None else 2 * windows * (bits + 2) / (pattern.m * bits)


def as_two_of_four(weight: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """Split a weight into 2:4 windows, without rounding and with each value in one window.

    A window takes the first two values that no earlier window has taken.

    Args:
        weight: `(C_out, C_in)`, N:M.
        pattern: N:M, for which `window_count` is not None.

    Returns:
        The 2:4 weight `(C_out, 2 N C_in / M)`, and int64 `(2 N C_in / M,)`, the input channel of
        each column.
    """
    blocks = weight.unflatten(1, (-1, pattern.m))
    remaining = blocks != 0
    windows = []
    starts = range(0, pattern.m - 2, 2)
    for start in starts:
        window = slice(start, start + 4)
        selected = remaining[..., window] & (remaining[..., window].cumsum(-1) <= 2)
        remaining[..., window] &= ~selected
        windows.append(torch.where(selected, blocks[..., window], 0.0))
    channels = torch.arange(weight.shape[1], device=weight.device).view(-1, pattern.m)
    columns = torch.cat([channels[:, start : start + 4] for start in starts], dim=1)
    return torch.cat(windows, dim=-1).flatten(1), columns.flatten()
