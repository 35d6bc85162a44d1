"""Hard permutations of soft ones, block by block, by linear sum assignments."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm.runtime import parallel
from permllm.runtime.compiling import attempted
from permllm.runtime.memory import to_device, to_host

# With fewer blocks than this, about 0.05 ms each at B = 64, a thread costs more than it saves.
_BLOCKS_A_THREAD = 128
# Channels of the largest block that a GPU solves, with a thread for a few of them.
_LARGEST = 1024


@torch.no_grad()
def harden(softs: Sequence[Tensor]) -> list[Tensor]:
    """Return the hard permutation of each block (PermLLM, equation 5).

    For a soft permutation `P_soft` it is the permutation matrix P that maximises
    `<P, P_soft> = sum_ij P[i, j] P_soft[i, j]`. Each rank solves every n-th block.

    Args:
        softs: stacks of blocks, `(blocks, B, B)` each, on one device, the same in all ranks; row =
            source channel, column = target position.

    Returns:
        int64 `(blocks, B)` each, on that device, the same in all ranks; entry j of a block is the
        source channel at position j (`P[perm[j], j] = 1`).

    Raises:
        ValueError: an entry is not finite.
    """
    rank, ranks = parallel.rank(), parallel.world_size()
    if ranks == 1:
        return _solved(softs)
    _check_finite(softs)  # in all ranks alike
    found = [torch.zeros(soft.shape[:2], dtype=torch.int64, device=soft.device) for soft in softs]
    for whole, mine in zip(found, _solved([soft[rank::ranks] for soft in softs]), strict=True):
        whole[rank::ranks] = mine
    parallel.all_reduce(found)
    return found


def _solved(softs: Sequence[Tensor]) -> list[Tensor]:
    """Solve blocks where they are if that is a GPU with Triton, and on the host otherwise."""
    device, solved = softs[0].device, None
    if device.type == "cuda":
        fits = max(soft.shape[1] for soft in softs) <= _LARGEST
        solved = _on_gpu(softs) if fits else None
        if solved is None:  # all at once, because each transfer is waited for
            together = to_host(torch.cat([soft.flatten() for soft in softs]))
            parts = together.split([soft.numel() for soft in softs])
            softs = [part.view(soft.shape) for part, soft in zip(parts, softs, strict=True)]
    _check_finite(softs)
    return solved or [to_device(perm, device) for perm in _on_host(softs)]


def _check_finite(softs: Sequence[Tensor]) -> None:
    if not bool(torch.stack([soft.sum().isfinite() for soft in softs]).all()):
        raise ValueError("a soft permutation is not finite")


def _assigned_on_gpu(softs: Sequence[Tensor]) -> list[Tensor]:
    from permllm.permutation.lcp.assignment_triton import assign  # there may be no Triton

    return [assign(soft) for soft in softs]


_on_gpu = attempted(_assigned_on_gpu, "the host solves the assignments, as the GPU cannot")


def _on_host(softs: Sequence[Tensor]) -> list[Tensor]:
    """Solve blocks on the host.

    The largest entries of all columns bound the objective from above. Where they form a
    permutation, that is the optimum, as in most blocks at low temperatures. SciPy solves the
    others.
    """
    perms = [soft.argmax(1) for soft in softs]
    unsolved: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for soft, perm in zip(softs, perms, strict=True):
        channel_left = torch.ones_like(perm, dtype=torch.bool).scatter_(1, perm, False).any(1)
        blocks = channel_left.nonzero().flatten()
        scores = soft[blocks].numpy()
        costs = scores.max(2, keepdims=True) - scores.astype(np.float64)
        costs -= costs.min(1, keepdims=True)  # the same optimum, found a quarter sooner
        unsolved += zip(costs, (perm[block].numpy() for block in blocks), strict=True)
    threads = max(1, min(torch.get_num_threads(), len(unsolved) // _BLOCKS_A_THREAD))
    with ThreadPoolExecutor(threads) as pool:  # SciPy releases the lock of the interpreter
        list(pool.map(_assign, [unsolved[first::threads] for first in range(threads)]))
    return perms


def _assign(blocks: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
    """Solve each (costs, permutation to overwrite)."""
    for costs, perm in blocks:
        source, position = linear_sum_assignment(costs)
        perm[position] = source
