"""Models of folders and random ones: formats, identities, devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from permllm.errors import ConfigError, DataError
from permllm.models.checkpoint import vocabulary_of
from permllm.models.load import check_windows, load_model, meta_model
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


def test_windows_with_tokens_that_the_model_lacks_are_refused() -> None:
    model = tiny_model("llama")
    windows = torch.tensor([[0, vocabulary_of(model)]])
    with pytest.raises(DataError, match=r"^text: .*259"):
        check_windows("text", windows, model)


def test_windows_beyond_a_buffer_of_positions_are_refused() -> None:
    windows = torch.zeros(1, 17, dtype=torch.long)
    check_windows("text", windows, tiny_model("llama", max_position_embeddings=16))  # computes them
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259, "rotary_dim": 4}
    gptj = AutoConfig.for_model("gptj", n_positions=16, **sizes)
    mpt = AutoConfig.for_model("mpt", max_seq_len=16, d_model=32, n_heads=4, n_layers=2)
    for config in (gptj, mpt):
        model = AutoModelForCausalLM.from_config(config)
        check_windows("text", windows[:, :16], model)
        with pytest.raises(DataError, match="16 positions"):
            check_windows("text", windows, model)
