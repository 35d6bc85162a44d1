"""N:M masks against brute force, with ties."""

from __future__ import annotations

import pytest
import torch

from permllm.errors import ConfigError
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import (
    is_nm_mask,
    nm_mask,
    permuted_nm_mask,
    ranks_of,
    saliency_sum,
    violations,
)
from permllm.store.tensors import PackedMasks
from tests.problems import random, shuffled

PATTERNS = [(2, 4), (1, 2), (5, 16), (8, 32)]


def brute_force(row: list[float], n: int, m: int) -> list[bool]:
    kept = [False] * len(row)
    for start in range(0, len(row), m):
        order = sorted(range(start, start + m), key=lambda i: (-row[i], i))
        for index in order[:n]:
            kept[index] = True
    return kept


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_mask_equals_sorting_each_group_with_ties_to_the_lowest_index(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + m)
    # Few values: many ties.
    saliency = torch.randint(0, 4, (16, 4 * m), generator=generator).double()
    mask = nm_mask(saliency, NMPattern(n, m))
    assert mask.tolist() == [brute_force(row, n, m) for row in saliency.tolist()]


@pytest.mark.parametrize("m", [17, 128, 300])
def test_wide_groups_are_ranked_by_sorting(m: int) -> None:
    values = torch.randint(0, 9, (m, 3), generator=torch.Generator().manual_seed(m)).double()
    found = torch.stack(ranks_of(values.unbind(0))).long()
    assert torch.equal(found, values.argsort(dim=0, descending=True, stable=True).argsort(dim=0))


def test_permuted_mask_is_n_m_in_permuted_order_only() -> None:
    saliency, perm, pattern = random(8, 32).abs(), shuffled(32), NMPattern(2, 4)
    mask = permuted_nm_mask(saliency, perm, pattern)
    permuted = saliency[:, perm].tolist()
    assert mask[:, perm].tolist() == [brute_force(row, 2, 4) for row in permuted]
    assert violations(mask.float(), perm, pattern) == 0
    assert violations(mask.float(), torch.arange(32), pattern) > 0
    assert is_nm_mask(mask, perm, pattern)
    assert not is_nm_mask(mask, torch.arange(32), pattern)
    fewer = mask.clone()
    fewer[3, mask[3].nonzero()[0]] = False
    assert not is_nm_mask(fewer, perm, pattern)
    assert violations(fewer.float(), perm, pattern) == 0
    kept = (saliency * mask).sum()
    assert saliency_sum(saliency, mask) == pytest.approx(float(kept), rel=1e-6)


@pytest.mark.parametrize("text", ["2-4", "4:2", "0:4", "4:4", "", 124, None, "2:4:8"])
def test_other_patterns_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        NMPattern.parse(text)


def test_packed_masks_are_those_that_were_given_in_an_eighth_of_their_bytes() -> None:
    given = {"a": random(3, 5) < 0, "b": random(16, 8) < 0}
    masks = PackedMasks(given)
    assert list(masks) == ["a", "b"]
    assert all(torch.equal(masks[name], mask) for name, mask in given.items())
    assert [masks.packed(name)[0].numel() for name in given] == [2, 16]
    masks["a"] = ~given["a"]
    del masks["b"]
    assert list(masks) == ["a"]
    assert torch.equal(masks["a"], ~given["a"])
