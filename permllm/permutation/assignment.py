"""From soft to hard permutations, block by block: the linear sum assignment that maximises `<P, soft>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def harden(soft: Tensor) -> Tensor:
    """The permutation of each block that maximises `<P, soft>` (PermLLM, equation 5).

    Args:
        soft: `(blocks, B, B)`, finite; row = source channel, column = target position.

    Returns:
        int64 `(blocks, B)` on the CPU; entry j of a block is the source channel at position j (`P[perm[j], j] = 1`).
    """
    return harden_all([soft])[0]


def harden_all(softs: Sequence[Tensor]) -> list[Tensor]:
    """`harden` for several tensors of one device, with a single copy to the host. Raises ValueError when one is not finite."""
    flat = torch.cat([soft.detach().flatten() for soft in softs]).cpu().numpy()
    if not np.isfinite(flat.sum()):
        raise ValueError("soft permutations that are not finite have no assignment")
    perms, start = [], 0
    for soft in softs:
        perms.append(torch.from_numpy(_assign(flat[start : start + soft.numel()].reshape(soft.shape))))
        start += soft.numel()
    return perms


def _assign(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # The largest entry of every column bounds the objective from above: where these entries already form a permutation,
    # they are the optimum, and at low temperatures most blocks are of that kind.
    perms = scores.argmax(axis=1).astype(np.int64)
    unsettled = np.flatnonzero((np.sort(perms, axis=1) != np.arange(scores.shape[-1])).any(axis=1))
    for block in unsettled:
        source, position = linear_sum_assignment(scores[block], maximize=True)
        perms[block, position] = source
    return perms
