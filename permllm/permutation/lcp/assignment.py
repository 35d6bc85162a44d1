"""From soft to hard permutations, block by block: the linear sum assignment that maximises `<P, soft>`."""

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
_NOT_FINITE = "soft permutations that are not finite have no assignment"


def harden(soft: Tensor) -> Tensor:
    """The permutation of each block that maximises `<P, soft>` (PermLLM, equation 5).

    Args:
        soft: `(blocks, B, B)`, finite; row = source channel, column = target position.

    Returns:
        int64 `(blocks, B)` where `soft` is; entry j of a block is the source channel at position j (`P[perm[j], j] = 1`).
    """
    return harden_all([soft])[0]


@torch.no_grad()
def harden_all(softs: Sequence[Tensor]) -> list[Tensor]:
    """`harden` for blocks of several sizes, of one device.

    A GPU with Triton solves them where they are (`permllm.permutation.lcp.assignment_triton`), and the host learns only
    whether all are finite. Without it the host solves them.

    Raises:
        ValueError: an entry is not finite.
    """
    device = softs[0].device
    if device.type == "cuda" and max(soft.shape[1] for soft in softs) <= _LARGEST:
        finite = torch.stack([soft.sum().isfinite() for soft in softs]).all()
        solved = _on_gpu(softs)
        if solved is not None:
            if not to_host(finite):
                raise ValueError(_NOT_FINITE)
            return solved
    if device.type == "cuda":  # all at once: each transfer is waited for
        parts = to_host(torch.cat([soft.flatten() for soft in softs])).split([soft.numel() for soft in softs])
        softs = [part.view(soft.shape) for part, soft in zip(parts, softs, strict=True)]
    if not all(bool(soft.sum().isfinite()) for soft in softs):
        raise ValueError(_NOT_FINITE)
    return [to_device(perm, device) for perm in _on_host(softs)]


def _assigned_on_gpu(softs: Sequence[Tensor]) -> list[Tensor]:
    from permllm.permutation.lcp.assignment_triton import assign  # there may be no Triton

    return [assign(soft) for soft in softs]


_on_gpu = attempted(_assigned_on_gpu, "the host solves the assignments, as the GPU cannot")


def harden_together(softs: Sequence[Tensor]) -> list[Tensor]:
    """`harden_all`, of which each rank does every n-th block; the same permutations in all of them."""
    processes = parallel.world_size()
    if processes == 1:
        return harden_all(softs)
    found = [torch.zeros(soft.shape[:2], dtype=torch.int32) for soft in softs]
    failed = torch.zeros(1, dtype=torch.int32)
    parts, places = [], []
    before = 0
    for soft, place in zip(softs, found, strict=True):
        mine = slice((parallel.rank() - before) % processes, None, processes)
        if len(place[mine]):
            parts.append(soft[mine])
            places.append(place[mine])
        before += len(place)
    try:
        perms = harden_all(parts) if parts else []
    except ValueError:
        failed += 1
    else:
        for place, perm in zip(places, perms, strict=True):
            place.copy_(perm)
    everything = torch.cat([failed, *(place.flatten() for place in found)])
    parallel.all_reduce([everything])  # each block is zero in all ranks but one
    if everything[0]:
        raise ValueError(_NOT_FINITE)
    perms = everything[1:].long().split([place.numel() for place in found])
    return [to_device(perm, soft.device).view(soft.shape[:2]) for perm, soft in zip(perms, softs, strict=True)]


def _on_host(softs: Sequence[Tensor]) -> list[Tensor]:
    """Solve finite blocks on the host.

    The largest entry of every column bounds the objective from above. Where these entries already form a permutation, they are
    the optimum, and at low temperatures most blocks are of that kind. The solver has the others.
    """
    perms = [soft.argmax(1) for soft in softs]
    unsolved: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for soft, perm in zip(softs, perms, strict=True):
        channel_left = torch.ones_like(perm, dtype=torch.bool).scatter_(1, perm, False).any(1)
        blocks = channel_left.nonzero().flatten()
        unsolved += zip(_costs(soft[blocks].numpy()), (perm[block].numpy() for block in blocks), strict=True)
    _assign(unsolved)
    return perms


def _costs(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Costs with the same optimum, less the least of their row and column: the solver finds it a quarter sooner."""
    costs = scores.max(2, keepdims=True) - scores.astype(np.float64)
    costs -= costs.min(1, keepdims=True)
    return costs


def _assign(blocks: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
    """Solve each (costs, permutation to overwrite). SciPy lets go of the interpreter, so threads run side by side."""

    def solve(share: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
        for costs, perm in share:
            source, position = linear_sum_assignment(costs)
            perm[position] = source

    threads = min(torch.get_num_threads(), len(blocks) // _BLOCKS_A_THREAD)
    if threads < 2:
        solve(blocks)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(solve, [blocks[first::threads] for first in range(threads)]))
