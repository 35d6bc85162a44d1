"""From soft to hard permutations, block by block: the linear sum assignment that maximises `<P, soft>`."""

from __future__ import annotations

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
    scores = soft.detach().to("cpu", torch.float32 if soft.dtype != torch.float64 else torch.float64).numpy()
    # The largest entry of every column bounds the objective from above: where these entries already form a permutation,
    # they are the optimum, and at low temperatures most blocks are of that kind.
    perms = scores.argmax(axis=1)
    unsettled = np.flatnonzero((np.sort(perms, axis=1) != np.arange(scores.shape[-1])).any(axis=1))
    for block in unsettled:
        source, position = linear_sum_assignment(scores[block], maximize=True)
        perms[block, position] = source
    return torch.from_numpy(perms.astype(np.int64))
