"""Seeds, and reproducible kernels where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from permllm.runtime.seeding import seed_everything


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    seed_everything(0, False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_seed_gives_the_same_numbers(deterministic: bool) -> None:
    numbers = []
    for _ in range(2):
        seed_everything(3, deterministic)
        numbers.append(torch.rand(4))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.equal(*numbers)
