"""RIA's channel reallocation against brute force."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from torch import Tensor

from permllm.permutation import heuristic
from permllm.permutation.foldable import shared_permutations
from permllm.permutation.heuristic import (
    Search,
    assigned,
    heuristic_permutation,
    heuristic_permutations,
    snake,
    sums_of_larger,
)
from permllm.settings.config import NMPattern
from tests.problems import PATTERN, problem, random, same, shuffled


def retained(parts: Tensor, perm: Tensor, pattern: NMPattern) -> float:
    """Return the saliency that a permutation retains of all parts."""
    groups = parts[:, :, perm].unflatten(2, (-1, pattern.m))
    return float(groups.topk(pattern.n, dim=3).values.sum())


def random_parts(count: int, rows: int, channels: int) -> Tensor:
    return random(count, rows, channels).abs() ** 3


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("text", ["2:4", "1:4", "6:8"])
def test_each_assignment_step_is_the_best_of_all_and_never_lowers(
    text: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristic, "ROWS_AT_A_TIME", 4)  # of six
    groups, pattern = 4, NMPattern.parse(text)
    m = pattern.m
    parts = random_parts(count, 6, groups * m)
    search = Search(lambda: parts, pattern)
    search.present = shuffled(groups * m)
    for position in range(m):
        best, before = 0.0, retained(parts, search.present, pattern)
        for exchange in itertools.permutations(range(groups)):
            places = search.present.view(groups, m).clone()
            places[:, position] = places[list(exchange), position]
            best = max(best, retained(parts, places.flatten(), pattern))
        search.exchange(position, assigned(search.scores(position)))
        assert sorted(search.present.tolist()) == list(range(groups * m))
        assert retained(parts, search.present, pattern) == pytest.approx(best, rel=1e-12)
        assert best >= before - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_an_assignment_is_the_best_of_all(tied: bool, dtype: torch.dtype) -> None:
    scores = 1e4 * random(6, 6).to(dtype)
    if tied:  # as those of channels that no group gains by
        scores[:3] = scores[:1]
    source = assigned(scores)
    orders = [list(order) for order in itertools.permutations(range(6))]
    sums = [float(scores.double()[order, range(6)].sum()) for order in orders]
    assert source.tolist() in orders
    assert float(scores.double()[source, range(6)].sum()) == pytest.approx(max(sums), rel=1e-12)


@pytest.mark.parametrize(("free", "together"), [(1 << 30, 3), (70_000, 2), (0, 1)])
def test_searches_solve_assignments_side_by_side_as_free_memory_allows(
    free: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristic, "cores", lambda: 3)
    monkeypatch.setattr(heuristic, "free_memory", lambda _: free)  # a search takes 16,384 bytes
    pools = Mock(wraps=heuristic.ThreadPoolExecutor)
    monkeypatch.setattr(heuristic, "ThreadPoolExecutor", pools)
    learning = problem()
    on_a_gpu: Any = SimpleNamespace(**vars(learning), saliency_of=learning.saliency_of)
    on_a_gpu.device = torch.device("cuda")
    shared = shared_permutations(learning.groups, "free")
    found = heuristic_permutations(shared, on_a_gpu, "order")
    assert same(heuristic_permutations(shared, learning, "order"), found)
    assert pools.call_args_list == [call(together), call(1)]


def test_sums_of_larger_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristic, "ROWS_IN_CACHE", 7)
    monkeypatch.setattr(heuristic, "PAIRS_IN_CACHE", 60)  # three of five at a time
    left, right = random(5, 30), random(3, 30, seed=1)
    expected = torch.stack([torch.stack([torch.max(a, b).sum() for b in right]) for a in left])
    torch.testing.assert_close(sums_of_larger(left, right), expected, rtol=1e-12, atol=0)


def test_channels_are_dealt_in_a_snake_by_the_total_of_all_parts() -> None:
    parts = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).expand(2, 3, 8)
    for start in (snake(parts.sum((0, 1)), 4), Search(lambda: parts, PATTERN).present):
        assert start.view(2, 4).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_the_identity_is_returned_when_nothing_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each group holds the two large entries of its row already: nothing can be gained, and a tie
    # goes to the identity.
    parts = [torch.tensor([[9.0, 9, 0, 0, 9, 9, 0, 0]])]
    assert torch.equal(heuristic_permutation(lambda: parts, PATTERN), torch.arange(8))
    worse = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    monkeypatch.setattr(Search, "exchange", lambda self, *_: setattr(self, "present", worse))
    assert torch.equal(heuristic_permutation(lambda: parts, PATTERN), torch.arange(8))
