"""Bytes and products of weights on kernels for 2:4, also of (M-2):M as overlapping windows."""

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
