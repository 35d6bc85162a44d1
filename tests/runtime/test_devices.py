"""Devices of processes, seeds, and reproducible kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from permllm.errors import ConfigError
from permllm.runtime.devices import resolve_device, seed_everything


def on_a_machine_with_two_gpus(size: int, device: str) -> SimpleNamespace:
    if device not in ("cpu", "cuda:0", "cuda:1", "mps"):
        raise RuntimeError("invalid device ordinal")
    return SimpleNamespace(device=torch.device(device))


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", on_a_machine_with_two_gpus)
    assert resolve_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert resolve_device("auto") == resolve_device("cuda") == torch.device(f"cuda:{rank}")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device in ("auto", "cuda:1", "mps"):
        with pytest.raises(ConfigError, match=rf"^model\.device='?{device}"):
            resolve_device(device)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"^model\.device='mps'"):
        resolve_device("mps")


def test_a_seed_gives_the_same_numbers_and_reproducible_kernels_where_asked_for() -> None:
    numbers = []
    for deterministic in (True, False):
        seed_everything(3, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        numbers.append(torch.rand(4))
    assert torch.equal(*numbers)
