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
    whether all are finite. Without it the host does: the largest entry of every column bounds the objective from above; where
    these entries already form a permutation, they are the optimum, and at low temperatures most blocks are of that kind. The
    device finds these, and only the others travel to the host.

    Raises:
        ValueError: an entry is not finite.
    """
    finite = torch.stack([soft.sum().isfinite() for soft in softs]).all()
    device = softs[0].device
    if device.type == "cuda" and max(soft.shape[1] for soft in softs) <= _LARGEST:
        solved = _on_gpu(softs)
        if solved is not None:
            if not to_host(finite):
                raise ValueError(_NOT_FINITE)
            return solved
    perms = [soft.argmax(1) for soft in softs]
    # A channel that no position has taken.
    left = [torch.ones_like(perm, dtype=torch.bool).scatter_(1, perm, False).any(1) for perm in perms]
    told = to_host(torch.cat([finite[None], *left]))
    if not told[0]:
        raise ValueError(_NOT_FINITE)
    places = [part.nonzero().flatten() for part in told[1:].split([len(soft) for soft in softs])]
    unsolved = [soft[to_device(place, device)] for soft, place in zip(softs, places, strict=True)]
    parts = to_host(torch.cat([part.flatten() for part in unsolved])).split([part.numel() for part in unsolved])
    on_host = [part.view(blocks.shape) for part, blocks in zip(parts, unsolved, strict=True)]
    for perm, place, found in zip(perms, places, _solved(on_host), strict=True):
        perm.index_copy_(0, to_device(place, device), to_device(found, device))
    return perms


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


def _solved(softs: Sequence[Tensor]) -> list[Tensor]:
    """The permutations of blocks on the host, by the solver, each int64 `(blocks, B)`."""
    perms = [np.empty(soft.shape[:2], dtype=np.int64) for soft in softs]
    _assign([pair for soft, perm in zip(softs, perms, strict=True) for pair in zip(_costs(soft.numpy()), perm, strict=True)])
    return [torch.from_numpy(perm) for perm in perms]


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
