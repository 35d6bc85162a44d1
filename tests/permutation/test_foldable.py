"""Orders that channel groups share, and those that fold: brute-force indices on random shapes."""

from __future__ import annotations

import pytest
import torch

from permllm.errors import ConfigError
from permllm.models.families import channel_groups
from permllm.permutation.foldable import (
    RESIDUAL,
    SharedPermutation,
    check_segments,
    expanded,
    folded_permutations,
    shared_permutations,
)
from permllm.permutation.heuristic import heuristic_permutation, segments_of
from permllm.settings.config import NMPattern
from tests.conftest import FAMILY_SETTINGS, tiny_model
from tests.problems import PATTERN, problem


def random_order(shared: SharedPermutation, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, shared.channels, shared.segment)
    parts = [start + torch.randperm(shared.segment, generator=generator) for start in starts]
    return torch.cat(parts)


def heads(segments: int, segment: int, repeats: int) -> SharedPermutation:
    return SharedPermutation("x", segments * segment, segment, repeats, ())


@pytest.mark.parametrize(("segments", "segment", "repeats"), [(1, 16, 1), (3, 12, 2), (1, 8, 4)])
def test_a_group_does_in_every_copy_what_the_shared_order_does(
    segments: int, segment: int, repeats: int
) -> None:
    shared = heads(segments, segment, repeats)
    order = random_order(shared)
    local = order.view(segments, segment) - segment * torch.arange(segments)[:, None]
    copies = local.repeat_interleave(repeats, 0)
    copies += segment * torch.arange(segments * repeats)[:, None]
    assert torch.equal(shared.expand(order), copies.flatten())
    found = shared.contract(shared.expand(order))
    assert found is not None
    assert torch.equal(found, order)


@pytest.mark.parametrize("other", [8, 1], ids=["crosses a head", "differs between copies"])
def test_an_order_that_no_shared_one_gives_is_not_shared(other: int) -> None:
    shared = heads(2, 4, 2)
    order = shared.expand(random_order(shared))
    order[[0, other]] = order[[other, 0]]
    assert shared.contract(order) is None


@pytest.mark.parametrize("block_size", [4, 8, 12])
def test_blocks_of_a_group_are_those_of_the_shared_order_and_gradients_add_up(
    block_size: int,
) -> None:
    shared = heads(2, 12, 3)
    stacks = shared.stacks(block_size)
    soft = [torch.rand(stack.count, stack.size, stack.size, requires_grad=True) for stack in stacks]
    group = shared.expand_blocks(soft)
    shapes = [(one.count, one.size, one.size) for one in shared.stacks(block_size, shared.repeats)]
    assert [tuple(matrix.shape) for matrix in group] == shapes
    # Each copy of a head has the blocks of the shared one.
    whole, mine = (
        torch.block_diag(*(block for stack in matrices for block in stack))
        for matrices in (group, soft)
    )
    copies = [mine[head : head + 12, head : head + 12] for head in (0, 12) for _ in range(3)]
    assert torch.equal(whole, torch.block_diag(*copies))
    whole.sum().backward()
    assert all(bool((matrix.grad == 3).all()) for matrix in soft)


def test_saliency_is_collected_with_the_copies_as_further_rows() -> None:
    shared = heads(2, 4, 3)
    scores = torch.rand(5, 24)
    collected = shared.collect(scores)
    assert collected.shape == (15, 8)
    for copy in range(3):
        columns = [(head * 3 + copy) * 4 + place for head in range(2) for place in range(4)]
        assert torch.equal(collected[copy * 5 : copy * 5 + 5], scores[:, columns])


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_foldable_orders_of_each_family(family: str) -> None:
    groups = channel_groups(tiny_model(family))
    shared = shared_permutations(groups, "foldable")
    assert [order.name for order in shared].count(RESIDUAL) == 1
    orders = {order.name: random_order(order, seed) for seed, order in enumerate(shared)}
    whole = expanded(shared, orders)
    assert whole.keys() == {group.name for group in groups}
    for group in groups:
        assert torch.equal(whole[group.name].sort().values, torch.arange(group.channels))
    found = folded_permutations(groups, whole)
    assert all(torch.equal(found[name], order) for name, order in orders.items())
    first = next(group for group in groups if group.layer == 1 and not group.table.producers)
    with pytest.raises(ConfigError, match=first.name):
        folded_permutations(groups, whole | {first.name: whole[first.name].flip(0)})


def test_m_divides_the_heads() -> None:
    shared = shared_permutations(channel_groups(tiny_model("llama")), "foldable")
    check_segments(shared, NMPattern(4, 8))
    with pytest.raises(ConfigError, match=r"o_proj.*16"):
        check_segments(shared, NMPattern(2, 16))


def test_the_streamed_heuristic_finds_the_order_of_all_rows_at_once() -> None:
    learning = problem(tiny_model("llama", dtype=torch.float64))
    shared = {order.name: order for order in shared_permutations(learning.groups, "foldable")}
    paths = [path for group in shared[RESIDUAL].groups for path in group.members]
    whole = torch.cat([learning.saliency_of(path) for path in paths])
    (streamed,) = segments_of(shared[RESIDUAL], learning.saliency_of)
    assert torch.equal(
        heuristic_permutation(streamed, PATTERN), heuristic_permutation(lambda: [whole], PATTERN)
    )


def test_the_heuristic_stays_inside_heads_and_counts_all_their_copies() -> None:
    groups = channel_groups(tiny_model("llama"))
    orders = shared_permutations(groups, "foldable")
    shared = next(order for order in orders if order.name.endswith("0.self_attn.o_proj"))
    assert (shared.channels, shared.segment, shared.repeats) == (16, 8, 2)
    scores = torch.rand(20, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies = scores.split(8, dim=1)
    for head, segment in enumerate(segments_of(shared, lambda path: scores)):
        rows = torch.cat(copies[2 * head : 2 * head + 2])
        expected = heuristic_permutation(lambda rows=rows: [rows], PATTERN)
        assert torch.equal(heuristic_permutation(segment, PATTERN), expected)
