"""Models of folders and random ones: formats, identities, devices."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from permllm import job
from permllm.errors import ConfigError, DataError
from permllm.models.checkpoint import vocabulary_of
from permllm.models.load import check_windows, folder_identity, load_model, meta_model, with_dtype
from permllm.settings.config import ModelConfig
from permllm.store.files import read_json, read_yaml, write_json
from tests.conftest import tiny_config, tiny_model
from tests.models.test_bad_checkpoints import WEIGHTS, local
from tests.settings.test_config import config


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


@pytest.mark.parametrize("form", ["config", "torch_dtype", "header", "bin"])
def test_a_folder_keeps_its_dtype(form: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    model = tiny_model("llama", dtype=torch.float16)
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    settings = read_json(folder / "config.json")
    if form != "config":
        stated = settings.pop("dtype")
        settings |= {"torch_dtype": stated} if form == "torch_dtype" else {}
        write_json(folder / "config.json", settings)
    if form == "bin":
        (folder / WEIGHTS).unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    words = ["model=local", f"model.path={folder}", "model.device=cpu", "logger=none"]
    words += ["permutation=none", "calibration=builtin", "evaluation=builtin"]
    words += ["calibration.samples=2", "calibration.seqlen=16", f"runs_dir={tmp_path}"]
    assert job.run(config(*words, "plan=true")) is None
    result = job.run(config(*words))
    assert result is not None
    assert result.metrics["model"].endswith(":float16")
    assert read_yaml(result.directory / "config.yaml")["model"]["dtype"] == "float16"
    again = job.run(config(*words, "model.dtype=float16"))
    assert again is not None
    assert (again.directory, again.skipped) == (result.directory, True)
    other = job.run(config(*words, "model.dtype=float32"))
    assert other is not None
    assert other.directory != result.directory


def test_a_gguf_file_is_read_as_bfloat16(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert with_dtype(local(tmp_path / "model.gguf", dtype="auto")).dtype == "bfloat16"


def identities(folder: Path) -> tuple[str, str]:
    """The identity of a loaded model, and the hash of a run with it."""
    hash_of_run = config("model=local", f"model.path={folder}", "model.dtype=float32").hash
    return folder_identity(local(folder), folder), hash_of_run


def test_the_identity_is_the_content_that_is_loaded(folder: Path, tmp_path: Path) -> None:
    first = identities(folder)
    assert load_model(local(folder), seed=1).identity == first[0]
    for name in ("notes.txt", "consolidated.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    copied = shutil.copytree(folder, tmp_path / "copied" / folder.name)
    os.utime(copied / "config.json")
    assert identities(folder) == identities(copied) == first
    files = ["config.json", "generation_config.json", "tokenizer_config.json", WEIGHTS]
    changed = [first]
    for name in files:
        (copied / name).write_bytes((copied / name).read_bytes() + b"\n")
        changed.append(identities(copied))
    assert all(len(set(part)) == len(changed) for part in zip(*changed, strict=True))


def test_indexed_weights_are_part_of_the_identity(folder: Path) -> None:
    tiny_model("qwen3").save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink()
    first = identities(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[::-1])
    assert all(now != before for now, before in zip(identities(folder), first, strict=True))


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


def test_windows_beyond_an_embedding_of_positions_are_refused() -> None:
    windows = torch.zeros(1, 17, dtype=torch.long)
    check_windows("text", windows, tiny_model("llama", max_position_embeddings=16))  # computes them
    with pytest.raises(DataError, match="16 positions"):
        check_windows("text", windows, tiny_model("opt", max_position_embeddings=16))
