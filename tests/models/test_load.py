"""Models of folders and random ones: formats, identities, devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from permllm.errors import ConfigError
from permllm.models.checkpoint import read_weights
from permllm.models.load import load_model, meta_model
from permllm.runtime.devices import resolve_device
from permllm.settings.config import ModelConfig
from tests.conftest import tiny_config, tiny_model
from tests.models.test_bad_checkpoints import local


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_in_the_dtype_that_was_asked_for(folder: Path) -> None:
    tokens = torch.randint(0, 259, (1, 200), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        loaded = load_model(local(folder, dtype=name), seed=0).model
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert loaded.dtype == dtype
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(loaded(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    assert meta_model(local(folder)).config.model_type == "qwen3"
    # A device that every machine has, and that is not the host's memory.
    model = read_weights(folder, torch.bfloat16, torch.device("meta"))
    assert model.device == torch.device("meta")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_identity_follows_the_weights(folder: Path) -> None:
    first = load_model(local(folder), seed=0).identity
    assert load_model(local(folder), seed=1).identity == first
    tiny_model("qwen3", seed=5).save_pretrained(folder)
    assert load_model(local(folder), seed=0).identity != first


def test_an_architecture_that_is_not_the_stated_one_is_refused(folder: Path) -> None:
    stated = {"model_type": "qwen3", "hidden_size": 64}
    with pytest.raises(ConfigError, match=r"model\.architecture\.hidden_size=64"):
        meta_model(local(folder, architecture=stated))


def test_random_weights_follow_the_seed() -> None:
    config = ModelConfig("tiny", "random", device="cpu", architecture=tiny_config("llama"))
    first, again, other = (load_model(config, seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


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
