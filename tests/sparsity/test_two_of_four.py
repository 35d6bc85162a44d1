"""Weights as overlapping 2:4 windows: every 6:8 group, whole products, what has no windows."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from permllm.settings.config import NMPattern
from permllm.sparsity.nm import nm_mask, violations
from permllm.sparsity.two_of_four import as_two_of_four, stored_share, window_count
from tests.problems import random

TWO_OF_FOUR = NMPattern(2, 4)


def test_every_group_of_6_8_is_split_exactly() -> None:
    """In float64, with whole numbers, whose sums do not depend on their order."""
    kept = torch.tensor([bits for bits in product([0.0, 1.0], repeat=8) if sum(bits) <= 6])
    weight = kept.double() * torch.tensor([3.0, -5, 7, 11, -13, 17, 19, 23])
    split, columns = as_two_of_four(weight, NMPattern(6, 8))
    assert split.shape == (len(kept), 12)
    assert violations(split, None, TWO_OF_FOUR) == 0
    assert columns.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]
    back = torch.zeros_like(weight).index_add_(1, columns, split)
    assert torch.equal(back, weight)
    assert torch.equal((split != 0).sum(1), (weight != 0).sum(1))  # each value is in one window


@pytest.mark.parametrize(("text", "windows"), [("2:4", 1), ("4:6", 2), ("6:8", 3), ("14:16", 7)])
def test_products_are_those_of_the_whole_weight(text: str, windows: int) -> None:
    pattern = NMPattern.parse(text)
    assert window_count(pattern) == windows
    weight, x = random(24, 4 * pattern.m), random(5, 4 * pattern.m, seed=1)
    weight = weight * nm_mask(weight.abs(), pattern)
    split, columns = as_two_of_four(weight, pattern)
    assert split.shape[1] == weight.shape[1] * 4 * windows / pattern.m
    assert violations(split, None, TWO_OF_FOUR) == 0
    torch.testing.assert_close(x[:, columns] @ split.T, x @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["4:8", "1:4", "3:5", "5:8"])
def test_other_patterns_have_no_windows_and_are_stored_dense(text: str) -> None:
    assert window_count(NMPattern.parse(text)) is None
    assert stored_share(NMPattern.parse(text), 8) == 1.0
