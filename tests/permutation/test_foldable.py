"""Orders that channel groups share, and those that fold: brute-force indices on random shapes."""

from __future__ import annotations

import pytest
import torch

from permllm.config import NMPattern
from permllm.errors import ConfigError
from permllm.models.families import channel_groups
from permllm.models.selection import pruned_groups
from permllm.permutation.foldable import RESIDUAL, SharedOrder, check_segments, expanded, foldable, shared_orders
from permllm.permutation.heuristic import heuristic_order, segments_of
from permllm.training.blocks import split_blocks
from tests.conftest import FAMILY_SETTINGS, tiny_model


def random_order(shared: SharedOrder, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, shared.channels, shared.segment)
    return torch.cat([start + torch.randperm(shared.segment, generator=generator) for start in starts])


def heads(segments: int, segment: int, repeats: int) -> SharedOrder:
    return SharedOrder("x", segments * segment, segment, repeats, ())


@pytest.mark.parametrize(("segments", "segment", "repeats"), [(1, 16, 1), (2, 8, 3), (3, 12, 2), (1, 8, 4)])
def test_a_group_does_in_every_copy_what_the_shared_order_does(segments: int, segment: int, repeats: int) -> None:
    shared = heads(segments, segment, repeats)
    order = random_order(shared)
    expected = []
    for head in range(segments):
        for copy in range(repeats):
            for place in range(segment):
                local = int(order[head * segment + place]) - head * segment
                expected.append((head * repeats + copy) * segment + local)
    assert shared.expand(order).tolist() == expected
    found = shared.shared(shared.expand(order))
    assert found is not None
    assert torch.equal(found, order)


def test_an_order_that_crosses_a_head_or_differs_between_copies_is_not_shared() -> None:
    shared = heads(2, 4, 2)
    order = shared.expand(random_order(shared))
    crossing = order.clone()
    crossing[[0, 8]] = order[[8, 0]]
    assert shared.shared(crossing) is None
    differing = order.clone()
    differing[[0, 1]] = order[[1, 0]]
    assert shared.shared(differing) is None


@pytest.mark.parametrize(("block_size", "sizes"), [(4, [4] * 6), (8, [8] * 3), (64, [8] * 3), (12, [8] * 3)])
def test_blocks_restart_at_each_segment_and_are_cut_to_it(block_size: int, sizes: list[int]) -> None:
    stacks = split_blocks(24, block_size, segment=8)
    assert [size for stack in stacks for size in [stack.size] * stack.count] == sizes


@pytest.mark.parametrize("block_size", [4, 8, 12])
def test_blocks_of_a_group_are_those_of_the_shared_order_and_gradients_add_up(block_size: int) -> None:
    shared = heads(2, 12, 3)
    stacks = shared.stacks(block_size)
    soft = [torch.rand(stack.count, stack.size, stack.size, requires_grad=True) for stack in stacks]
    group = shared.expand_blocks(soft)
    group_stacks = shared.group_stacks(block_size)
    assert [tuple(matrix.shape) for matrix in group] == [(stack.count, stack.size, stack.size) for stack in group_stacks]
    # Each entry of a group's block is that of the block which holds the same shared positions.
    whole, mine = torch.zeros(72, 72), torch.zeros(24, 24)
    for matrix, stack in zip(group, group_stacks, strict=True):
        for block in range(stack.count):
            at = slice(stack.start + block * stack.size, stack.start + (block + 1) * stack.size)
            whole[at, at] = matrix[block].detach()
    for matrix, stack in zip(soft, stacks, strict=True):
        for block in range(stack.count):
            at = slice(stack.start + block * stack.size, stack.start + (block + 1) * stack.size)
            mine[at, at] = matrix[block].detach()
    for head in range(2):
        for copy in range(3):
            at = slice((head * 3 + copy) * 12, (head * 3 + copy + 1) * 12)
            source = slice(head * 12, head * 12 + 12)
            assert torch.equal(whole[at, at], mine[source, source])
    sum(matrix.sum() for matrix in group).backward()
    assert all(bool((matrix.grad == 3).all()) for matrix in soft)


def test_saliency_is_collected_with_the_copies_as_further_rows() -> None:
    shared = heads(2, 4, 3)
    scores = torch.rand(5, 24)
    collected = shared.collect(scores)
    assert collected.shape == (15, 8)
    for row in range(5):
        for copy in range(3):
            for head in range(2):
                at = (head * 3 + copy) * 4
                assert torch.equal(collected[copy * 5 + row, head * 4 : head * 4 + 4], scores[row, at : at + 4])


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_foldable_orders_of_each_family(family: str) -> None:
    model = tiny_model(family)
    groups = channel_groups(model)
    shared = shared_orders(groups, "foldable")
    assert [order.name for order in shared].count(RESIDUAL) == 1
    assert sorted(group.name for order in shared for group in order.groups) == sorted(group.name for group in groups)
    orders = {order.name: random_order(order, seed) for seed, order in enumerate(shared)}
    whole = expanded(shared, orders)
    assert all(torch.equal(whole[group.name].sort().values, torch.arange(group.channels)) for group in groups)
    found = foldable(groups, whole)
    assert all(torch.equal(found[name], order) for name, order in orders.items())
    first = next(group for group in groups if group.layer == 1 and not group.table.producers)
    with pytest.raises(ConfigError, match=f"{first.name} does not fold"):
        foldable(groups, whole | {first.name: whole[first.name].flip(0)})


def test_free_orders_are_one_for_each_group_with_one_segment() -> None:
    groups = channel_groups(tiny_model("llama"))
    shared = shared_orders(groups, "free")
    assert [order.name for order in shared] == [group.name for group in groups]
    assert all(order.segment == order.channels and order.repeats == 1 for order in shared)


def test_m_must_divide_the_heads() -> None:
    with pytest.raises(ConfigError, match=r"heads of x have 6 channels, which M = 4"):
        check_segments([heads(2, 6, 1)], NMPattern(2, 4))


def test_one_m_divides_the_other_where_groups_share_an_order() -> None:
    groups = channel_groups(tiny_model("llama"))
    mixed = pruned_groups(groups, NMPattern(2, 4), ["0.self_attn.o_proj"], {"self_attn.qkv_proj": "4:8", "down_proj": "1:2"})
    (residual, *others) = shared_orders(mixed, "foldable")
    check_segments([residual, *others], NMPattern(2, 4))
    with pytest.raises(ConfigError, match=r"mlp.gate_up_proj is 2:3, and others .* have groups of 8: one M must divide"):
        check_segments([residual], NMPattern(2, 3))


def test_the_streamed_heuristic_finds_the_order_of_all_rows_at_once() -> None:
    groups = channel_groups(tiny_model("llama"))
    (residual,) = [order for order in shared_orders(groups, "foldable") if order.name == RESIDUAL]
    generator = torch.Generator().manual_seed(0)
    scores = {
        path: torch.rand(rows, group.channels, generator=generator, dtype=torch.float64)
        for group in residual.groups
        for path, rows in zip(group.members, group.rows, strict=True)
    }
    asked: list[str] = []

    def saliency_of(path: str) -> torch.Tensor:
        asked.append(path)
        return scores[path]

    pattern = NMPattern(2, 4)
    whole = torch.cat([scores[path] for group in residual.groups for path in group.members])
    (streamed,) = segments_of(residual, saliency_of, pattern)
    assert torch.equal(heuristic_order(streamed), heuristic_order(lambda: [(whole, pattern)]))
    assert len(asked) == (pattern.m + 2) * len(scores)  # once for the totals, once a position, once to compare


def test_the_heuristic_stays_inside_heads_and_counts_all_their_copies() -> None:
    groups = channel_groups(tiny_model("llama"))
    shared = next(order for order in shared_orders(groups, "foldable") if order.name.endswith("0.self_attn.o_proj"))
    assert (shared.channels, shared.segment, shared.repeats) == (16, 8, 2)
    scores = torch.rand(20, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pattern = NMPattern(2, 4)
    for head, segment in enumerate(segments_of(shared, lambda path: scores, pattern)):
        rows = torch.cat([scores[:, (head * 2 + copy) * 8 : (head * 2 + copy + 1) * 8] for copy in range(2)])
        assert torch.equal(heuristic_order(segment), heuristic_order(lambda rows=rows: [(rows, pattern)]))
