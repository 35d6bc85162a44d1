"""Seeds, reproducible kernels where they are asked for, and devices of the settings."""

from __future__ import annotations

import pytest
import torch

from permllm.errors import ConfigError
from permllm.runtime.devices import resolve_device, seed_everything


def test_a_seed_gives_the_same_numbers_and_reproducible_kernels_where_asked_for() -> None:
    numbers = []
    for deterministic in (True, False):
        seed_everything(3, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        numbers.append(torch.rand(4))
    assert torch.equal(*numbers)


def test_a_device_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # a machine that has it
    with pytest.raises(ConfigError, match=r"model\.device='mps'"):
        resolve_device("mps")


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for own in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", own)
        assert resolve_device("auto") == resolve_device("cuda") == torch.device(f"cuda:{own}")
    with pytest.raises(ConfigError, match=r"model\.device=cuda:1"):
        resolve_device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="3 processes"):
        resolve_device("auto")
