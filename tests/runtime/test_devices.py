"""Seeds, and reproducible kernels where they are asked for."""

from __future__ import annotations

import torch

from permllm.runtime.devices import seed_everything


def test_a_seed_gives_the_same_numbers_and_reproducible_kernels_where_asked_for() -> None:
    numbers = []
    for deterministic in (True, False):
        seed_everything(3, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        numbers.append(torch.rand(4))
    assert torch.equal(*numbers)
