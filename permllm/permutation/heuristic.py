"""RIA's heuristic channel permutation (Zhang et al. 2024, "Plug-and-Play", section 4.2): allocate, then assign.

Channels are sorted by their total saliency and dealt in a snake over the groups' M positions. Then, one position after the
other, the channels at that position are exchanged among the groups by a linear sum assignment that maximises the retained
saliency. The score of putting channel a into group b is `sum_r max(t[r, b], x[r, a])` plus a constant of the group, with t
the N-th largest entry of the group's other M - 1 channels in row r.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial, reduce
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from permllm.config import NMPattern, RunConfig, check_divides
from permllm.models.families import ChannelGroup
from permllm.models.offload import placement_of
from permllm.permutation.base import Constraint, LocalPermutation
from permllm.permutation.foldable import SharedOrder, check_segments, expanded, shared_orders
from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.values import SETTINGS
from permllm.sparsity.nm import nm_mask, saliency_sum
from permllm.training.problem import LearningProblem

# Scores are summed over this many rows at a time, to bound the float32 copies of a large group.
_ROWS_AT_A_TIME = 4096
# A GPU has the scores of others while the host solves the assignments of some, as long as what they hold takes no more bytes.
_HELD = 2e9
# On a CPU over so many, and for so many pairs of a row and a group, as stay in its cache.
_ROWS_IN_CACHE, _PAIRS_IN_CACHE = 256, 1 << 19


Parts = Callable[[], Iterable[tuple[Tensor, NMPattern]]]
"""Saliency `(rows, C)` of some rows at a time, and their N:M, anew at each call: all rows of a shared order may not fit into
memory. Of different M one divides the other: the groups of the smaller lie inside those of the larger."""
Steps: TypeAlias = Generator[Tensor, Tensor, Tensor]
"""A search that waits for assignments: it gives the scores of one, is sent what `assigned` makes of them, and ends with the
order."""


class Search(NamedTuple):
    """The search for an order.

    Attributes:
        name: of the order.
        held: bytes on the device while it is under way.
        steps: of it, which do nothing before they are asked for.
    """

    name: str
    held: int
    steps: Steps


@dataclass(frozen=True, config=SETTINGS)
class Heuristic(LocalPermutation):
    """Permutation of each channel group by RIA's channel reallocation."""

    constraint: Constraint = "free"

    @property
    def local(self) -> bool:  # type: ignore[override]
        """Each group's order follows from its own saliency."""
        return self.constraint == "free"

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        if not self.local:
            check_segments(shared_orders(groups, self.constraint), config.pattern)

    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """The order of one channel group, int64 `(C_in,)` on the CPU; `saliency (rows of all members, C_in)`."""
        return heuristic_order(lambda: [(saliency, pattern)])

    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        """The orders of all channel groups under the constraint, int64 `(C_in,)` on the CPU by group."""
        shared = shared_orders(problem.groups, self.constraint)
        return expanded(shared, found_orders(shared, problem, "heuristic permutation"))


def found_orders(shared: list[SharedOrder], problem: LearningProblem, what: str) -> dict[str, Tensor]:
    """Search for orders, int64 `(channels,)` on the CPU by name. Each rank searches for every n-th, and returns all of them.

    Where layers are sharded each rank searches for all orders, because all ranks enter a layer at the same point. A search for
    the order of one group enters its layer when it begins. One for the order of several groups enters layers all the while, so
    that no other search runs beside it.
    """
    mine = shared[parallel.rank() :: parallel.world_size()]
    parts = [mine]
    if parallel.world_size() > 1:
        from permllm.models.sharded import Sharded  # seconds, for a single process in vain

        if isinstance(placement_of(problem.model), Sharded):
            parts = [[order for order in shared if (len(order.groups) > 1) == several] for several in (True, False)]
    found: dict[str, Tensor] = {}
    for part in parts:
        searches = [search_of(order, problem.saliency_of, problem.pattern) for order in part]
        found |= searched(searches, problem.device, what)
    zeros = {order.name: torch.zeros(order.channels, dtype=torch.int64) for order in shared}
    orders = zeros | {order.name: found[order.name] for order in mine}
    parallel.all_reduce(orders.values())
    return orders


def searched(searches: list[Search], device: torch.device, what: str) -> dict[str, Tensor]:
    """What searches find, int64 `(channels,)` on the CPU by the name of the order.

    Args:
        searches: each under way as soon as there is a place.
        device: of the saliency. On a CPU one search comes after the other, since its scores take all threads.
        what: is found, for the bar.
    """
    places = 1 if device.type == "cpu" else cores()  # not torch's threads, which torchrun makes one
    found: dict[str, Tensor] = {}
    running: dict[Future[Tensor], Search] = {}
    ahead = searches[::-1]
    with ThreadPoolExecutor(places) as pool, tqdm(total=len(searches), desc=what, unit="permutation") as bar:

        def go_on(search: Search, answer: Tensor | None) -> None:
            try:
                scores = next(search.steps) if answer is None else search.steps.send(answer)
            except StopIteration as end:
                found[search.name] = end.value
                bar.update()
            else:
                running[pool.submit(assigned, scores)] = search

        while ahead or running:
            held = sum(search.held for search in running.values())
            if ahead and (not running or (len(running) < places and held + ahead[-1].held <= _HELD)):
                go_on(ahead.pop(), None)
                continue
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                go_on(running.pop(done), done.result())
    return {search.name: found[search.name] for search in searches}


def search_of(shared: SharedOrder, saliency_of: Callable[[str], Tensor], pattern: NMPattern) -> Search:
    """The search for the heuristic permutation of each segment of a shared order, int64 `(channels,)` on the CPU.

    Args:
        shared: the order; the rows of all of its groups count.
        saliency_of: `(C_out, C_in)` of the linear at a module path. Where several groups share the order it is asked for one
            group at a time, several times.
        pattern: N:M of the groups that have none of their own.
    """
    of_one = len(shared.groups) == 1

    def whole(group: ChannelGroup) -> tuple[Tensor, NMPattern]:
        return shared.collect(torch.cat([saliency_of(path) for path in group.members])), group.pattern or pattern

    def steps() -> Steps:
        # That of one group fits, and its segments need not make it again.
        held = [whole(shared.groups[0])] if of_one else None

        def parts(start: int) -> Iterator[tuple[Tensor, NMPattern]]:
            for scores, its in held or map(whole, shared.groups):
                yield scores[:, start : start + shared.segment], its

        found = []
        for start in range(0, shared.channels, shared.segment):
            found.append(start + (yield from _steps(partial(parts, start))))
        return torch.cat(found)

    largest = max(group.channels * sum(group.rows) for group in shared.groups)
    return Search(shared.name, 4 * largest, steps())


def heuristic_order(saliency: Parts) -> Tensor:
    """Order that retains more saliency than the identity, or that when it does not.

    Args:
        saliency: parts `(rows, C_in)`, floating, nonnegative: the rows of all layers that share the order; M divides C_in.

    Returns:
        int64 `(C_in,)` on the CPU.
    """
    steps = _steps(saliency)
    try:
        scores = next(steps)
        while True:
            scores = steps.send(assigned(scores))
    except StopIteration as end:
        found: Tensor = end.value
        return found


def _steps(saliency: Parts) -> Steps:
    """`heuristic_order`, one assignment after the other."""
    sums, patterns = zip(*((part.sum(0), pattern) for part, pattern in saliency()), strict=True)
    total = _sum(sums)
    smallest, largest = (choose(patterns, key=lambda pattern: pattern.m) for choose in (min, max))
    check_divides(largest, len(total), "the layer")
    perm = allocate(total, smallest)
    for position in range(largest.m):
        sources = yield position_scores(saliency, perm, position, largest.m)
        perm = exchanged(perm, position, largest.m, sources)
    identity = torch.arange(len(total))
    retained = [0.0, 0.0]
    for part, pattern in saliency():
        for index, order in enumerate((identity, perm)):
            retained[index] += _retained(part, order, pattern)
    return perm if retained[1] > retained[0] else identity


def allocate(total: Tensor, pattern: NMPattern) -> Tensor:
    """Deal the channels, sorted by total saliency, in a snake: first place of every group, second place backwards, ...

    Args:
        total: `(C_in,)`, the saliency of each channel over all rows.
        pattern: N:M.

    Returns:
        int64 `(C_in,)` on the CPU.
    """
    groups = len(total) // pattern.m
    order = total.argsort(descending=True, stable=True).view(pattern.m, groups)
    snake = torch.stack([row if place % 2 == 0 else row.flip(0) for place, row in enumerate(order)], dim=1)
    return snake.flatten().cpu()


def assignment_scores(saliency: Tensor, perm: Tensor, position: int, pattern: NMPattern) -> Tensor:
    """Scores of moving the channels at one position among the groups.

    Args:
        saliency: `(rows, C_in)`.
        perm: int64, the present order of groups of M channels, all of them or some.
        position: which of the M places of every group is exchanged.
        pattern: N:M.

    Returns:
        `(groups, groups)`, entry (a, b): retained saliency of group b when its channel at `position` is replaced by that of
        group a, less a constant of b (the N - 1 largest of the other entries).
    """
    places = perm.to(saliency.device).view(-1, pattern.m)
    moving = places[:, position]
    others = places[:, [place for place in range(pattern.m) if place != position]]
    scores = torch.zeros(len(places), len(places), dtype=saliency.dtype, device=saliency.device)
    for part in saliency.split(_ROWS_AT_A_TIME):
        part_t = part.t()
        candidates = part_t[moving]
        # N-th largest of M - 1 per row; the smallest when N = M - 1, so N - 1 others always stay.
        threshold = part_t[others].topk(pattern.n, dim=1).values[:, -1]
        scores += sums_of_larger(candidates, threshold)
    return scores


def sums_of_larger(left: Tensor, right: Tensor) -> Tensor:
    """`sum_r max(left[a, r], right[b, r])` for all a and b: `(A, B)` of `(A, rows)` and `(B, rows)`."""
    if left.device.type != "cpu":
        # max(u, v) = (u + v + |u - v|) / 2, so that it is two sums and a matrix of L1 distances.
        return (left.sum(1)[:, None] + right.sum(1)[None, :] + torch.cdist(left, right, p=1.0)) / 2
    found = torch.zeros(len(left), len(right), dtype=left.dtype)
    for of_left, of_right in zip(left.split(_ROWS_IN_CACHE, 1), right.split(_ROWS_IN_CACHE, 1), strict=True):
        few, all_ = of_left.contiguous(), of_right.contiguous()
        at_a_time = max(1, _PAIRS_IN_CACHE // all_.numel())
        for some, sums in zip(few.split(at_a_time), found.split(at_a_time), strict=True):
            sums += torch.maximum(some[:, None], all_).sum(2)
    return found


def position_scores(saliency: Parts, perm: Tensor, position: int, m: int) -> Tensor:
    """Scores of moving the channels at one position among all groups of the largest M, as `assignment_scores`, on the CPU.

    Args:
        saliency: parts `(rows, C_in)`, whose M divide `m`.
        perm: int64 `(C_in,)` on the CPU, the present order.
        position: of the `m` places of every group.
        m: the largest M.
    """
    places = perm.view(-1, m)

    def scores_of(part: Tensor, pattern: NMPattern) -> Tensor:
        first = position - position % pattern.m  # of the group of a smaller M that the position is in
        inside = places[:, first : first + pattern.m].flatten()
        return assignment_scores(part, inside, position % pattern.m, pattern)

    return _sum(scores_of(part, pattern) for part, pattern in saliency()).cpu()


def assigned(scores: Tensor) -> Tensor:
    """The assignment of the largest score.

    Args:
        scores: `(groups, groups)` on the CPU, entry (a, b) that of the channel of group a in group b.

    Returns:
        int64 `(groups,)`: the group whose channel each gets.
    """
    costs = scores.max().item() - scores.double().numpy()
    # The solver looks for a path from each row. With groups as rows, less the least of each group and then of each channel, it
    # takes a third to a fifth of the time: 21 seconds instead of 101 for the four positions of a width of 11,008.
    costs -= costs.min(0)
    costs -= costs.min(1, keepdims=True)
    _, source = linear_sum_assignment(np.ascontiguousarray(costs.T))
    return torch.from_numpy(source)


def exchanged(perm: Tensor, position: int, m: int, sources: Tensor) -> Tensor:
    """The order int64 `(C_in,)` in which each group of m has, at a position, the channel that was there in its source."""
    places = perm.view(-1, m).clone()
    places[:, position] = places[sources, position]
    return places.flatten()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(Tensor.add, parts)


def _retained(saliency: Tensor, perm: Tensor, pattern: NMPattern) -> float:
    total = 0.0
    for part in saliency.split(_ROWS_AT_A_TIME):
        permuted = part[:, perm.to(part.device)]
        total += saliency_sum(permuted, nm_mask(permuted, pattern))
    return total
