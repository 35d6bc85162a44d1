"""From soft to hard permutations, block by block: the linear sum assignment that maximises `<P, soft>`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Fewer blocks than this are solved sooner than a thread starts (about 0.05 ms a block of 64).
_BLOCKS_A_THREAD = 16


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
    perms: list[np.ndarray[Any, Any]] = []
    open_blocks, start = [], 0
    for soft in softs:
        scores = flat[start : start + soft.numel()].reshape(soft.shape)
        start += soft.numel()
        # The largest entry of every column bounds the objective from above: where these entries already form a permutation,
        # they are the optimum, and at low temperatures most blocks are of that kind.
        perms.append(scores.argmax(axis=1).astype(np.int64))
        settled = (np.sort(perms[-1], axis=1) == np.arange(scores.shape[-1])).all(axis=1)
        open_blocks += [(scores[block], perms[-1][block]) for block in np.flatnonzero(~settled)]
    _assign(open_blocks)
    return [torch.from_numpy(perm) for perm in perms]


def _assign(blocks: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
    """Solve each (scores, permutation to overwrite). SciPy lets go of the interpreter, so threads run side by side."""

    def solve(share: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
        for scores, perm in share:
            source, position = linear_sum_assignment(scores, maximize=True)
            perm[position] = source

    threads = min(torch.get_num_threads(), len(blocks) // _BLOCKS_A_THREAD)
    if threads < 2:
        solve(blocks)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(solve, [blocks[first::threads] for first in range(threads)]))
