"""RIA's channel reallocation against brute force."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.models.families import channel_groups
from permllm.permutation.foldable import shared_orders
from permllm.permutation.heuristic import (
    allocate,
    assigned,
    assignment_scores,
    exchanged,
    heuristic_order,
    heuristic_orders,
    position_scores,
    segments_of,
    sums_of_larger,
)
from tests.conftest import tiny_model


def retained(saliency: Tensor, perm: Tensor, pattern: NMPattern) -> float:
    groups = saliency[:, perm].unflatten(1, (-1, pattern.m))
    return float(groups.topk(pattern.n, dim=2).values.sum())


def random_saliency(rows: int, channels: int, seed: int) -> Tensor:
    return torch.rand(rows, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).pow(3)


PATTERNS = ["2:4", "1:4", "3:4", "4:8", "2:8", "6:8", "8:16"]


@pytest.mark.parametrize("patterns", [*([text] for text in PATTERNS), ["2:4", "4:8"], ["8:16", "1:4"]], ids=" and ".join)
@pytest.mark.parametrize("seed", range(2))
def test_each_assignment_step_is_the_best_of_all_and_never_lowers(patterns: list[str], seed: int) -> None:
    groups, m = 4, max(NMPattern.parse(text).m for text in patterns)
    parts = [(random_saliency(6, groups * m, seed + part), NMPattern.parse(text)) for part, text in enumerate(patterns)]

    def of_all(order: Tensor) -> float:
        return sum(retained(saliency, order, pattern) for saliency, pattern in parts)

    perm = torch.randperm(groups * m, generator=torch.Generator().manual_seed(seed))
    for position in range(m):
        best = 0.0
        for exchange in itertools.permutations(range(groups)):
            places = perm.view(groups, m).clone()
            places[:, position] = places[list(exchange), position]
            best = max(best, of_all(places.flatten()))
        after = exchanged(perm, position, m, assigned(position_scores(lambda: parts, perm, position, m)))
        assert sorted(after.tolist()) == list(range(len(perm)))
        assert of_all(after) == pytest.approx(best, rel=1e-12)
        assert of_all(after) >= of_all(perm) - 1e-12
        perm = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_an_assignment_is_the_best_of_all(seed: int, dtype: torch.dtype) -> None:
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 1e4
    if seed % 2:  # as those of channels that no group gains by
        scores[:3] = scores[:1]
    source = assigned(scores)
    best = max(sum(float(scores[a, b]) for b, a in enumerate(order)) for order in itertools.permutations(range(6)))
    assert sorted(source.tolist()) == list(range(6))
    assert sum(float(scores[a, b]) for b, a in enumerate(source.tolist())) == pytest.approx(best, rel=1e-12)


class Problem:
    """Random saliencies of a small model, on a device that is said to be a GPU."""

    pattern, device = NMPattern(2, 4), torch.device("cuda")

    def __init__(self) -> None:
        self.model = tiny_model("llama")
        self.shared = shared_orders(channel_groups(self.model), "free")
        paths = [(path, group) for order in self.shared for group in order.groups for path in group.members]
        self.scores = {path: random_saliency(8, group.channels, seed) for seed, (path, group) in enumerate(paths)}
        self.saliency_of = self.scores.__getitem__


@pytest.mark.parametrize(("free", "together"), [(1 << 30, 3), (70_000, 2), (0, 1)])
def test_searches_solve_assignments_side_by_side_as_free_memory_allows(
    free: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permllm.permutation.heuristic.cores", lambda: 3)
    monkeypatch.setattr("permllm.permutation.heuristic.free_memory", lambda _: free)  # a search takes 16,384 bytes
    problem: Any = Problem()
    parts = {order.name: segments_of(order, problem.saliency_of, problem.pattern)[0] for order in problem.shared}
    expected = {name: heuristic_order(part) for name, part in parts.items()}
    calls, met, threads = itertools.count(), threading.Barrier(together, timeout=20), set()

    def meeting(scores: Tensor) -> Tensor:
        if next(calls) < together:
            met.wait()
        threads.add(threading.get_ident())
        return assigned(scores)

    monkeypatch.setattr("permllm.permutation.heuristic.assigned", meeting)
    found = heuristic_orders(problem.shared, problem, "order")
    assert list(found) == list(expected)
    assert all(torch.equal(order, found[name]) for name, order in expected.items())
    assert len(threads) == together


def test_scores_equal_a_loop_over_groups_up_to_a_constant_of_the_group() -> None:
    pattern = NMPattern(2, 4)
    saliency = random_saliency(7, 24, 0)
    perm = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    scores = assignment_scores(saliency, perm, 1, pattern)
    places = perm.view(6, 4)
    for b in range(6):
        full = []
        for a in range(6):
            members = places[b].clone()
            members[1] = places[a, 1]
            full.append(float(saliency[:, members].topk(2, dim=1).values.sum()))
        difference = torch.tensor(full, dtype=torch.float64) - scores[:, b]
        torch.testing.assert_close(difference, difference[:1].expand(6), rtol=0, atol=1e-10)


def test_sums_of_larger_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permllm.permutation.heuristic._ROWS_IN_CACHE", 7)
    monkeypatch.setattr("permllm.permutation.heuristic._PAIRS_IN_CACHE", 60)  # three of five at a time
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(count, 30, dtype=torch.float64, generator=generator) for count in (5, 3))
    expected = [[sum(max(u, v) for u, v in zip(a, b, strict=True)) for b in right.tolist()] for a in left.tolist()]
    torch.testing.assert_close(sums_of_larger(left, right), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_channels_are_dealt_in_a_snake() -> None:
    saliency = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert allocate(saliency.sum(0), NMPattern(2, 4)).view(2, 4).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_an_order_of_two_patterns_retains_more_of_both_than_the_identity() -> None:
    parts = [(random_saliency(20, 64, seed), NMPattern.parse(text)) for seed, text in enumerate(("2:4", "4:8"))]
    perm = heuristic_order(lambda: parts)
    assert sorted(perm.tolist()) == list(range(64))
    for saliency, pattern in parts:
        assert retained(saliency, perm, pattern) > retained(saliency, torch.arange(64), pattern)


@pytest.mark.parametrize("seed", range(5))
def test_result_is_a_permutation_that_retains_at_least_as_much_as_the_identity(seed: int) -> None:
    pattern = NMPattern(2, 4)
    saliency = random_saliency(20, 64, seed)
    perm = heuristic_order(lambda: [(saliency, pattern)])
    assert sorted(perm.tolist()) == list(range(64))
    assert retained(saliency, perm, pattern) > retained(saliency, torch.arange(64), pattern)


def test_the_identity_is_returned_when_nothing_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each group holds the two large entries of its row already: nothing can be gained, and a tie goes to the identity.
    saliency = torch.tensor([[9.0, 9, 0, 0, 9, 9, 0, 0]])
    assert torch.equal(heuristic_order(lambda: [(saliency, NMPattern(2, 4))]), torch.arange(8))
    worse = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    monkeypatch.setattr("permllm.permutation.heuristic.exchanged", lambda *args: worse)
    assert torch.equal(heuristic_order(lambda: [(saliency, NMPattern(2, 4))]), torch.arange(8))


def test_many_rows_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    saliency = random_saliency(50, 16, 0)
    perm = torch.arange(16)
    whole = assignment_scores(saliency, perm, 0, NMPattern(2, 4))
    monkeypatch.setattr("permllm.permutation.heuristic._ROWS_AT_A_TIME", 7)
    torch.testing.assert_close(assignment_scores(saliency, perm, 0, NMPattern(2, 4)), whole)
