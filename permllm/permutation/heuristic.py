"""RIA's heuristic channel permutation (Zhang et al. 2024, "Plug-and-Play", section 4.2).

Allocation: channels are sorted by their total saliency, and a snake distributes them over the M
positions of the groups. Assignment: for one position after the other, a linear sum assignment
exchanges the channels at this position among the groups, so that most saliency is retained. With
saliency `S (rows, C_in)`, the score of channel a in group b is, up to a constant of the group,

    score[a, b] = sum_r max(t[r, b], S[r, a])

Here `t[r, b]` is the N-th largest of the group's other M - 1 entries in row r.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.models.offload import placement_of
from permllm.permutation.base import Constraint, LocalPermutation
from permllm.permutation.foldable import (
    SharedPermutation,
    check_segments,
    expanded,
    shared_permutations,
)
from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.memory import free_memory
from permllm.settings.config import NMPattern, RunConfig
from permllm.settings.values import SETTINGS
from permllm.sparsity.nm import nm_mask, saliency_sum
from permllm.training.problem import LearningProblem

# Rows whose scores are summed at a time, which limits the float32 copies of a large group.
ROWS_AT_A_TIME = 4096
# Share of a GPU's free memory for the saliencies of searches that run together.
_SHARE_OF_FREE = 0.5
# Rows, and pairs of a row and a group, that fit into the cache of a CPU.
ROWS_IN_CACHE = 256
PAIRS_IN_CACHE = 1 << 19
# Function that yields the saliency `(rows, C)` of some rows at a time, because all rows of a shared
# permutation may not fit into memory.
Parts = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, config=SETTINGS)
class Heuristic(LocalPermutation):
    """RIA's channel reallocation, for each shared permutation of the constraint."""

    searches = True
    constraint: Constraint

    @property
    def local(self) -> bool:  # type: ignore[override]
        """Tell whether the permutation of a group depends on its own saliency alone."""
        return self.constraint == "free"

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        """Raise ConfigError if a permutation cannot fold, or M does not divide its segments."""
        check_segments(shared_permutations(groups, self.constraint), config.pattern)

    @override
    def permutation(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Search for the permutation of a group."""
        return heuristic_permutation(lambda: [saliency], pattern)

    @override
    def permutations(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Search for all shared permutations, in all ranks together."""
        shared = shared_permutations(problem.groups, self.constraint)
        return expanded(shared, heuristic_permutations(shared, problem, "heuristic permutation"))


def heuristic_permutations(
    shared: list[SharedPermutation], problem: LearningProblem, label: str
) -> dict[str, Tensor]:
    """Search for shared permutations, segment by segment.

    On a GPU several searches of about equal width run together, and the cores of the host solve
    their assignments. On a CPU one search follows the other, because its scores take all threads.
    With n ranks, each searches for every n-th permutation; with sharded layers, which all ranks
    enter together, for all.

    Returns:
        The values of `shared`, int64 `(channels,)` on the CPU, by name.
    """
    mine = shared[parallel.rank() :: parallel.world_size()]
    searched = shared if placement_of(problem.model).sharded else mine
    by_width = sorted(searched, key=lambda permutation: permutation.channels)
    together = parallel.broadcast(_searches_at_once(shared, problem.device))
    values = {
        permutation.name: torch.zeros(permutation.channels, dtype=torch.int64)
        for permutation in shared
    }
    progress = tqdm(total=len(by_width), desc=label, unit="permutation")
    with ThreadPoolExecutor(together) as pool, progress:
        for first in range(0, len(by_width), together):
            batch = by_width[first : first + together]
            parts: list[Parts] = []
            for permutation in batch:
                parts += segments_of(permutation, problem.saliency_of)
            segments = iter(_searched(parts, problem.pattern, pool.map))
            del parts  # frees the saliency before the next one is made
            for permutation in batch:
                starts = range(0, permutation.channels, permutation.segment)
                value = torch.cat([start + next(segments) for start in starts])
                if permutation in mine:
                    values[permutation.name] = value
                progress.update()
    parallel.all_reduce(values.values())
    return values


def _searches_at_once(shared: list[SharedPermutation], device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    groups = [group for permutation in shared for group in permutation.groups]
    largest = max((4 * group.channels * sum(group.rows) for group in groups), default=1)
    return max(1, min(cores(), int(_SHARE_OF_FREE * free_memory(device)) // largest))


def segments_of(shared: SharedPermutation, saliency_of: Callable[[str], Tensor]) -> list[Parts]:
    """Return the saliency of each segment of a shared permutation.

    `saliency_of` returns that of the linear at a path, `(C_out, C_in)`. If several groups share the
    permutation, it is called several times for each linear.
    """

    def on_shared_positions(group: ChannelGroup) -> Tensor:
        return shared.collect(torch.cat([saliency_of(path) for path in group.members]))

    if len(shared.groups) > 1:  # on the residual stream, which is one segment
        return [lambda: map(on_shared_positions, shared.groups)]
    # The saliency of one group fits into memory, so that its segments can share it.
    segments = on_shared_positions(shared.groups[0]).split(shared.segment, dim=1)
    return [partial(iter, [segment]) for segment in segments]


def heuristic_permutation(saliency: Parts, pattern: NMPattern) -> Tensor:
    """Return a permutation that retains more saliency than the identity, or the identity.

    Args:
        saliency: parts `(rows, C_in)`, floating, nonnegative, with the rows of all layers that
            share the permutation; M divides C_in.

    Returns:
        int64 `(C_in,)` on the CPU.
    """
    return _searched([saliency], pattern, map)[0]


def _searched(
    saliencies: list[Parts], pattern: NMPattern, solve: Callable[..., Iterator[Tensor]]
) -> list[Tensor]:
    """Search by each saliency; `solve(function, items)` does as `map`, perhaps in threads."""
    searches = [Search(saliency, pattern) for saliency in saliencies]
    for position in range(pattern.m):
        scores = (search.scores(position) for search in searches)
        for search, sources in zip(searches, solve(assigned, scores), strict=True):
            search.exchange(position, sources)
    return [search.permutation() for search in searches]


class Search:
    """Search for one permutation, `present`, int64 `(C_in,)` on the CPU.

    Args:
        saliency, pattern: as in `heuristic_permutation`.
    """

    def __init__(self, saliency: Parts, pattern: NMPattern) -> None:
        self._saliency = saliency
        self._pattern = pattern
        self.present = snake(reduce(torch.add, (part.sum(0) for part in saliency())), pattern.m)

    def scores(self, position: int) -> Tensor:
        """Return `assignment_scores` for one of the M positions, on the CPU."""
        parts = (
            assignment_scores(part, self.present, position, self._pattern)
            for part in self._saliency()
        )
        return reduce(torch.add, parts).cpu()

    def exchange(self, position: int, sources: Tensor) -> None:
        """Give each group the channel at `position` of its source group, int64 `(groups,)`."""
        places = self.present.view(-1, self._pattern.m)
        places[:, position] = places[sources, position]

    def permutation(self) -> Tensor:
        """Return the present permutation, or the identity if it retains as much saliency."""
        identity = torch.arange(len(self.present))
        if self._retained(self.present) > self._retained(identity):
            return self.present
        return identity

    def _retained(self, permutation: Tensor) -> float:
        retained = 0.0
        for part in self._saliency():
            for rows in part.split(ROWS_AT_A_TIME):
                permuted = rows[:, permutation.to(rows.device)]
                retained += saliency_sum(permuted, nm_mask(permuted, self._pattern))
        return retained


def snake(total: Tensor, m: int) -> Tensor:
    """Distribute the channels, sorted by total saliency `(C_in,)`, in a snake over groups of M.

    They fill the first place of every group, then the second in backward direction, and so on. The
    result is int64 `(C_in,)` on the CPU.
    """
    places = total.argsort(descending=True, stable=True).view(m, -1)
    snake = [row.flip(0) if place % 2 else row for place, row in enumerate(places)]
    return torch.stack(snake, dim=1).flatten().cpu()


def assignment_scores(
    saliency: Tensor, permutation: Tensor, position: int, pattern: NMPattern
) -> Tensor:
    """Return the scores of moving the channels at one position among the groups.

    Args:
        saliency: `(rows, C_in)`.
        permutation: int64 `(C_in,)`; its groups are M consecutive channels.
        position: position in each group whose channels are exchanged, from 0 to M - 1.

    Returns:
        `(groups, groups)`. Entry (a, b) is the retained saliency of group b if the channel of group
        a takes `position` in it, minus a constant of b (the sum of its N - 1 largest others).
    """
    places = permutation.to(saliency.device).view(-1, pattern.m)
    moving = places[:, position]
    others = places[:, [place for place in range(pattern.m) if place != position]]
    scores = torch.zeros(len(places), len(places), dtype=saliency.dtype, device=saliency.device)
    for part in saliency.split(ROWS_AT_A_TIME):
        part_t = part.t()
        # The N-th largest of the M - 1 other entries in each row.
        threshold = part_t[others].topk(pattern.n, dim=1).values[:, -1]
        scores += sums_of_larger(part_t[moving], threshold)
    return scores


def sums_of_larger(u: Tensor, v: Tensor) -> Tensor:
    """Return `sum_r max(u[a, r], v[b, r])`: `(A, B)` of `(A, rows)` and `(B, rows)`."""
    if u.device.type != "cpu":
        # max(u, v) = (u + v + |u - v|) / 2 takes two sums and a matrix of L1 distances.
        return (u.sum(1)[:, None] + v.sum(1)[None, :] + torch.cdist(u, v, p=1.0)) / 2
    sums = torch.zeros(len(u), len(v), dtype=u.dtype)
    for first in range(0, u.shape[1], ROWS_IN_CACHE):
        rows = slice(first, first + ROWS_IN_CACHE)
        u_rows = u[:, rows].contiguous()
        v_rows = v[:, rows].contiguous()
        at_a_time = max(1, PAIRS_IN_CACHE // v_rows.numel())
        parts = zip(u_rows.split(at_a_time), sums.split(at_a_time), strict=True)
        for u_part, sums_part in parts:
            sums_part += torch.maximum(u_part[:, None], v_rows).sum(2)
    return sums


def assigned(scores: Tensor) -> Tensor:
    """Return the source group of each group's new channel, int64 `(groups,)`, in the best total.

    Args:
        scores: `(groups, groups)` on the CPU; entry (a, b) is of the channel of group a in group b.
    """
    costs = scores.max().item() - scores.double().numpy()
    # The minima of groups and channels are subtracted, and groups are rows, because the solver then
    # takes a third to a fifth of the time: 21 s instead of 101 s for the four positions of 11,008
    # channels.
    costs -= costs.min(0)
    costs -= costs.min(1, keepdims=True)
    _, source = linear_sum_assignment(np.ascontiguousarray(costs.T))
    return torch.from_numpy(source)
