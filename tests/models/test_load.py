"""Models from folders and from the hub, and what bad ones get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, ByT5Tokenizer

from permllm.config import ModelConfig
from permllm.errors import ConfigError, DataError
from permllm.models import checkpoint
from permllm.models.load import load_model, meta_model
from permllm.runtime.devices import resolve_device
from tests.conftest import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def local(path: Path, **settings: object) -> ModelConfig:
    return ModelConfig(name="local", source="local", path=str(path), device="cpu", **settings)  # type: ignore[arg-type]


def test_a_local_folder_loads_in_the_dtype_that_was_asked_for(folder: Path) -> None:
    loaded = load_model(local(folder, dtype="bfloat16"), seed=0)
    assert loaded.model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    torch.testing.assert_close(
        load_model(local(folder), seed=0).model(input_ids=torch.arange(9)[None]).logits,
        tiny_model("qwen3")(input_ids=torch.arange(9)[None]).logits,
    )
    assert meta_model(local(folder)).config.model_type == "qwen3"


def test_rotary_frequencies_stay_in_float32(folder: Path) -> None:
    loaded = load_model(local(folder, dtype="bfloat16"), seed=0).model
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    tokens = torch.randint(0, 259, (1, 200))
    assert torch.equal(loaded(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = ModelConfig(
        name="r", source="random", device="cpu", dtype="bfloat16", architecture=architecture
    )
    random = load_model(config, 0).model
    assert random.dtype == torch.bfloat16
    assert random.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_truncated_weight_file_is_one_line(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot load"):
        load_model(local(folder), seed=0)


def test_the_identity_follows_the_weights(folder: Path) -> None:
    first = load_model(local(folder), seed=0).identity
    assert load_model(local(folder), seed=1).identity == first
    tiny_model("qwen3", seed=5).save_pretrained(folder)
    assert load_model(local(folder), seed=0).identity != first


def test_an_architecture_that_is_not_the_stated_one_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"hidden_size=64, but the loaded model has 32; model\.architecture=null"
    ):
        load_model(local(folder, architecture={"model_type": "qwen3", "hidden_size": 64}), seed=0)


def test_folders_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        load_model(local(tmp_path / "nothing"), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        load_model(local(tmp_path / "empty"), seed=0)
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ConfigError,
        match="'bert' cannot be told: a token's logits depend on the tokens that follow",
    ):
        load_model(local(tmp_path / "bert"), seed=0)


def test_random_weights_follow_the_seed() -> None:
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = ModelConfig(
        name="tiny", source="random", device="cpu", architecture=architecture | {"vocab_size": 259}
    )
    first, again, other = (load_model(config, seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_are_read_onto_the_device_and_not_moved_there(folder: Path) -> None:
    # A device that every machine has, and that is not the host's memory; what is there has no
    # values to check.
    model = checkpoint.read_weights(folder, torch.bfloat16, torch.device("meta"))
    assert model.device == torch.device("meta")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_device_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # a machine that has it
    with pytest.raises(
        ConfigError, match=r"model\.device='mps' cannot be used here; valid are auto, cpu, and cuda"
    ):
        resolve_device("mps")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for own in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", own)
        assert resolve_device("auto") == resolve_device("cuda") == torch.device(f"cuda:{own}")
    with pytest.raises(
        ConfigError,
        match=r"model\.device=cuda:1 is one GPU for 2 processes; model\.device=cuda gives each",
    ):
        resolve_device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="3 processes need as many GPUs, and this machine has 2"):
        resolve_device("auto")
