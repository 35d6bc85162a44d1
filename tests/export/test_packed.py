"""Packed weights: bits against a hand-made example, sizes against arithmetic, and every weight back as it was."""

from __future__ import annotations

import pytest
import torch

from permllm import job
from permllm.errors import ConfigError, DataError
from permllm.export.packed import pack, packed_shapes, unpack
from permllm.sparsity import NMPattern, nm_mask
from tests.test_config import config

PATTERNS = [
    NMPattern(2, 4),
    NMPattern(4, 8),
    NMPattern(1, 4),
    NMPattern(2, 6),
    NMPattern(3, 5),
    NMPattern(8, 16),
    NMPattern(1, 2),
]


def sparse(rows: int, groups: int, pattern: NMPattern, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * pattern.m, generator=generator)
    return torch.where(nm_mask(weight.abs(), pattern), weight, 0.0)


def test_the_bits_of_a_small_weight() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]])
    values, places = pack(weight, NMPattern(2, 4))
    assert values.tolist() == [[5.0, 7.0, 1.0, 2.0]]
    # Places 1, 3, 0, 1 at two bits each, the first lowest: 01 + 11 << 2 + 00 << 4 + 01 << 6.
    assert places.tolist() == [[0b01_00_11_01]]
    values, places = pack(torch.tensor([[0.0, 0, 0, 0, 9.0, 0], [8.0, 0, 0, 0, 0, 4.0]]), NMPattern(2, 6))
    assert values.tolist() == [[0.0, 9.0], [8.0, 4.0]]
    assert places.tolist() == [[0b00_100_000], [0b00_101_000]]  # three bits each, the row padded to a byte


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unpacking_gives_back_every_bit(pattern: NMPattern, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permllm.export.packed._rows_at_a_time", lambda channels: 7)  # the last weight goes in parts
    for rows, groups in [(1, 1), (5, 3), (16, 12)]:
        weight = sparse(rows, groups, pattern, rows).to(dtype)
        weight[0, : pattern.m] = 0.0  # a group with fewer than N
        values, places = pack(weight, pattern)
        expected = packed_shapes(rows, groups * pattern.m, pattern)
        assert (tuple(values.shape), tuple(places.shape)) == expected
        found = unpack(values, places, pattern)
        assert found.dtype == dtype
        assert torch.equal(found, weight)
        assert not (found.signbit() & (found == 0)).any()


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5625), ("4:8", 0.59375)])
def test_the_share_of_the_bytes_in_bfloat16(pattern: str, share: float) -> None:
    nm = NMPattern.parse(pattern)
    weight = sparse(64, 256 // nm.m, nm).to(torch.bfloat16)
    size = sum(part.numel() * part.element_size() for part in pack(weight, nm))
    assert size / (weight.numel() * 2) == share


def test_what_is_not_sparse_is_not_packed() -> None:
    with pytest.raises(DataError, match="not 2:4 in stored order"):
        pack(torch.ones(2, 8), NMPattern(2, 4))


def test_groups_whose_places_take_more_than_a_byte_are_not_packed() -> None:
    weight = sparse(2, 512, NMPattern(128, 256))
    assert torch.equal(unpack(*pack(weight, NMPattern(128, 256)), NMPattern(128, 256)), weight)
    with pytest.raises(DataError, match="256:512 cannot be packed"):
        pack(weight, NMPattern(256, 512))
    asked = config("model=tiny", "permutation=none", "sparsity=256:512", "export=folded", "export.format=packed")
    with pytest.raises(ConfigError, match=r"export\.format=packed packs groups of at most 256 weights"):
        job.export_request(asked, job.methods_of(asked))


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(2, 6)], ids=str)
def test_places_that_do_not_ascend_or_lie_outside_are_refused(pattern: NMPattern) -> None:
    values, places = pack(sparse(4, 6, pattern), pattern)
    with pytest.raises(DataError, match="places of its values"):
        unpack(values, torch.zeros_like(places), pattern)
    with pytest.raises(DataError, match="places of its values"):
        unpack(values, torch.full_like(places, 255), pattern)
