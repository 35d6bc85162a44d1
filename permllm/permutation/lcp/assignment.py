"""From soft to hard permutations, block by block: the linear sum assignment that maximises `<P, soft>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm.runtime import parallel
from permllm.runtime.compiling import usable
from permllm.runtime.memory import to_device, to_host

# With fewer blocks than this, about 0.05 ms each at B = 64, a thread costs more than it saves.
_BLOCKS_A_THREAD = 128
# Blocks that travel from a GPU in any case: 8 MB at B = 64, sooner copied than waited for a second time.
_ANYWAY = 512
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
def harden_all(softs: Sequence[Tensor], open_before: dict[int, int] | None = None) -> list[Tensor]:
    """`harden` for blocks of several sizes, of one device.

    A GPU with Triton solves them where they are (`permllm.permutation.lcp.assignment_triton`), and the host learns only
    whether all are finite. Without it the host does: the largest entry of every column bounds the objective from above; where
    these entries already form a permutation, they are the optimum, and at low temperatures most blocks are of that kind. The
    device finds these, and only the others travel to the host, which is waited for once, and once more where many more are
    open than before.

    Args:
        softs: each `(blocks, B, B)`, finite.
        open_before: how many blocks of each, by its number, were not settled the last time, which is kept up to date: twice
            as many, and an eighth of all, travel before anyone knows which are open, and all where nothing is known.

    Raises:
        ValueError: an entry is not finite.
    """
    broken = ~torch.stack([soft.sum().isfinite() for soft in softs]).all()
    on_gpu = softs[0].device.type == "cuda"
    solvers = [device_solver(soft.shape[1], soft.dtype) if on_gpu else None for soft in softs]
    if all(solvers):
        found_there = [solve(soft) for solve, soft in zip(solvers, softs, strict=True) if solve]
        if to_host(broken):
            raise ValueError(_NOT_FINITE)
        return found_there
    before = {} if open_before is None else open_before
    perms = [soft.argmax(1) for soft in softs]
    # A channel that no position has taken.
    left = [torch.ones_like(perm, dtype=torch.bool).scatter_(1, perm, False).any(1) for perm in perms]
    likely = []
    for number, (soft, part) in enumerate(zip(softs, left, strict=True)):
        count = 2 * before[number] + len(soft) // 8 + _ANYWAY if number in before else len(soft)
        likely.append(soft[_first(part, count)] if count < len(soft) else soft)
    told = [broken[None], *left]
    host = to_host(torch.cat([part.flatten().to(softs[0].dtype) for part in (*told, *likely)]))
    if host[0]:
        raise ValueError(_NOT_FINITE)
    flags, *came = host[1:].split([sum(map(len, softs)), *(part.numel() for part in likely)])
    places = [part.nonzero().flatten() for part in flags.split([len(soft) for soft in softs])]
    open_blocks = []
    for number, (soft, place, found) in enumerate(zip(softs, places, came, strict=True)):
        before[number] = len(place)
        there = found.view(-1, *soft.shape[1:])
        if len(there) == len(soft):
            open_blocks.append(there[place])
        elif len(place) <= len(there):
            open_blocks.append(there[: len(place)])
        else:
            open_blocks.append(to_host(soft[to_device(place, soft.device)]))
    for perm, place, solved in zip(perms, places, _solved(open_blocks), strict=True):
        if len(place):
            perm.index_copy_(0, to_device(place, perm.device), to_device(solved, perm.device))
    return perms


@cache
def device_solver(size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Solves blocks `(blocks, B, B)` on the GPU that they are on; None, with a word, where nothing here can.

    Args:
        size: B, with which the kernel is tried: another may be compiled for another one.
        dtype: of the blocks, likewise.
    """
    if size > _LARGEST:
        return None

    def compiled() -> Callable[[Tensor], Tensor]:
        from permllm.permutation.lcp.assignment_triton import assign

        backwards = torch.eye(size, dtype=dtype, device="cuda").flip(0)
        if assign(backwards[None]).tolist() != [list(range(size))[::-1]]:
            raise RuntimeError("its answer is wrong")
        return assign

    return usable(compiled, "cuda", "the host solves the assignments, as the GPU cannot")


def _first(flags: Tensor, count: int) -> Tensor:
    """Indices of at most `count` entries, those that are True before the others, each kind in ascending order."""
    return flags.to(torch.int8).argsort(descending=True, stable=True)[:count]


def harden_together(softs: Sequence[Tensor], open_before: dict[int, int] | None = None) -> list[Tensor]:
    """`harden_all`, of which each rank does every n-th block; the same permutations in all of them."""
    processes = parallel.world_size()
    if processes == 1:
        return harden_all(softs, open_before)
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
        perms = harden_all(parts, open_before) if parts else []
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
