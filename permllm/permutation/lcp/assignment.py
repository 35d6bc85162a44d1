"""Hard permutations from soft permutations, block by block, by linear sum assignments."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm.runtime.compiling import with_fallback
from permllm.runtime.memory import to_device, to_host

# Least blocks for a thread: with fewer (about 0.05 ms each at B = 64), starting it takes longer.
_BLOCKS_A_THREAD = 128
# Channels in the largest block that a GPU solves.
_LARGEST = 1024
# Costs of a block, and its permutation, which is overwritten.
_Block: TypeAlias = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@torch.no_grad()
def harden(softs: Sequence[Tensor]) -> list[Tensor]:
    """Return the hard permutation of each block (PermLLM, equation 5).

    It is the permutation matrix P that maximises `<P, P_soft> = sum_ij P[i, j] P_soft[i, j]`, with
    the soft permutation `P_soft`. A GPU with Triton solves its blocks, and else the host.

    Args:
        softs: stacks of blocks, `(blocks, B, B)` each, on one device; row = source channel, column
            = target position.

    Returns:
        int64 `(blocks, B)` for each stack, on the same device. Entry j of a block is the source
        channel at position j (`P[permutation[j], j] = 1`).

    Raises:
        ValueError: an entry is not finite.
    """
    device = softs[0].device
    solved = None
    if device.type == "cuda":
        if max(soft.shape[1] for soft in softs) <= _LARGEST:
            solved = _on_gpu(softs)
        if solved is None:  # in one transfer, because the host waits for each
            together = to_host(torch.cat([soft.flatten() for soft in softs]))
            parts = together.split([soft.numel() for soft in softs])
            softs = [part.view(soft.shape) for part, soft in zip(parts, softs, strict=True)]
    if not bool(torch.stack([soft.sum().isfinite() for soft in softs]).all()):
        raise ValueError("a soft permutation is not finite")
    return solved or [to_device(permutation, device) for permutation in _on_host(softs)]


def _assigned_on_gpu(softs: Sequence[Tensor]) -> list[Tensor]:
    from permllm.permutation.lcp.assignment_triton import assign  # Triton may be missing

    return [assign(soft) for soft in softs]


_on_gpu = with_fallback(_assigned_on_gpu, "the host solves the assignments, because the GPU cannot")


def _on_host(softs: Sequence[Tensor]) -> list[Tensor]:
    # The sum of the columns' largest entries bounds the objective from above. If these entries form
    # a permutation, as in most blocks at low temperatures, it is the optimum.
    permutations = [soft.argmax(1) for soft in softs]
    unsolved: list[_Block] = []
    for soft, permutation in zip(softs, permutations, strict=True):
        channel_left = (
            torch.ones_like(permutation, dtype=torch.bool).scatter_(1, permutation, False).any(1)
        )
        blocks = channel_left.nonzero().flatten()
        scores = soft[blocks].numpy()
        costs = scores.max(2, keepdims=True) - scores.astype(np.float64)
        costs -= costs.min(1, keepdims=True)  # the same optimum, in three quarters of the time
        unsolved += zip(costs, (permutation[block].numpy() for block in blocks), strict=True)
    threads = max(1, min(torch.get_num_threads(), len(unsolved) // _BLOCKS_A_THREAD))
    with ThreadPoolExecutor(threads) as pool:  # SciPy releases the interpreter's lock
        list(pool.map(_assign, [unsolved[first::threads] for first in range(threads)]))
    return permutations


def _assign(blocks: list[_Block]) -> None:
    for costs, permutation in blocks:
        source, position = linear_sum_assignment(costs)
        permutation[position] = source
