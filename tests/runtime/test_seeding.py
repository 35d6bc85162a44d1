"""Seeds, and reproducible kernels where they are asked for."""

from __future__ import annotations

import torch

from permllm.runtime.seeding import seed_everything


def test_a_seed_gives_the_same_numbers() -> None:
    numbers = []
    for deterministic in (True, False):
        seed_everything(3, deterministic)
        numbers.append(torch.rand(4))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.equal(*numbers)
