"""From soft to hard permutations, block by block: the linear sum assignment that maximises `<P, soft>`."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm.runtime import parallel
from permllm.runtime.memory import to_host

# With fewer blocks than this, about 0.05 ms each at B = 64, a thread costs more than it saves.
_BLOCKS_A_THREAD = 128
_NOT_FINITE = "soft permutations that are not finite have no assignment"


def harden(soft: Tensor) -> Tensor:
    """The permutation of each block that maximises `<P, soft>` (PermLLM, equation 5).

    Args:
        soft: `(blocks, B, B)`, finite; row = source channel, column = target position.

    Returns:
        int64 `(blocks, B)` on the CPU; entry j of a block is the source channel at position j (`P[perm[j], j] = 1`).
    """
    return harden_flat(soft.detach().flatten(), [soft.shape])[0]


def flatten(softs: Iterable[Tensor], entries: int) -> tuple[Tensor, list[torch.Size]]:
    """Several soft permutations of one device and dtype one behind the other, and their shapes.

    Args:
        softs: each `(blocks, B, B)`; may be made one at a time, none is kept.
        entries: of all of them together, at least 1.
    """
    flat = torch.empty(0)
    shapes: list[torch.Size] = []
    start = 0
    for soft in softs:
        if not shapes:
            flat = torch.empty(entries, dtype=soft.dtype, device=soft.device)
        flat[start : start + soft.numel()] = soft.detach().flatten()
        start += soft.numel()
        shapes.append(soft.shape)
    return flat, shapes


def harden_flat(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """`harden` for what `flatten` gives, with a single copy to the host. Raises ValueError when an entry is not finite."""
    host = to_host(flat).numpy()
    if not np.isfinite(host.sum()):
        raise ValueError(_NOT_FINITE)
    perms: list[np.ndarray[Any, Any]] = []
    open_blocks: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    start = 0
    for shape in shapes:
        scores = host[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
        # The largest entry of every column bounds the objective from above: where these entries already form a permutation,
        # they are the optimum, and at low temperatures most blocks are of that kind.
        perms.append(scores.argmax(axis=1).astype(np.int64))
        settled = (np.sort(perms[-1], axis=1) == np.arange(scores.shape[-1])).all(axis=1)
        unsettled = np.flatnonzero(~settled)
        open_blocks += zip(_costs(scores[unsettled]), (perms[-1][block] for block in unsettled), strict=True)
    _assign(open_blocks)
    return [torch.from_numpy(perm) for perm in perms]


def harden_together(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """`harden_flat`, of which each process of torchrun does every n-th block; the same permutations in all of them."""
    processes = parallel.world_size()
    if processes == 1:
        return harden_flat(flat, shapes)
    found = [torch.zeros(shape[:2], dtype=torch.int32) for shape in shapes]
    failed = torch.zeros(1, dtype=torch.int32)
    parts, places = [], []
    before = 0
    for stack, place in zip(flat.split([shape.numel() for shape in shapes]), found, strict=True):
        mine = slice((parallel.rank() - before) % processes, None, processes)
        parts.append(stack.view(-1, *place.shape[1:], place.shape[1])[mine])
        places.append(place[mine])
        before += len(place)
    try:
        perms = harden_flat(torch.cat([part.flatten() for part in parts]), [part.shape for part in parts])
    except ValueError:
        failed += 1
    else:
        for place, perm in zip(places, perms, strict=True):
            place.copy_(perm)
    everything = torch.cat([failed, *(place.flatten() for place in found)])
    parallel.add_up([everything])  # each block is zero in all processes but one
    if everything[0]:
        raise ValueError(_NOT_FINITE)
    perms = everything[1:].long().split([place.numel() for place in found])
    return [perm.view_as(place) for perm, place in zip(perms, found, strict=True)]


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
