"""Random checkpoints: transformers reads them, in shards, and the same command writes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm.settings.checkpoints import indexed_files
from tests.conftest import ROOT, run_python

SCRIPT = "scripts/random_checkpoint.py"


def written(folder: Path, *words: str) -> Path:
    done = run_python(SCRIPT, str(folder), "model=tiny-random", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_random_checkpoint_is_a_model_like_any_other(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", "model.dtype=bfloat16")
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 2
    weights = model.model.layers[1].mlp.down_proj.weight.float()
    assert 0.015 < float(weights.detach().std()) < 0.025
    assert bool((model.model.norm.weight == 1).all())
    assert bool(model(torch.arange(16).unsqueeze(0)).logits.isfinite().all())
    shards = written(tmp_path / "shards", "model.dtype=bfloat16", "--shard-gb", "0.00005")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert indexed_files(shards / "model.safetensors.index.json")
    same = AutoModelForCausalLM.from_pretrained(shards).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_its_tokenizer_has_a_token_for_each_byte_in_any_class(tmp_path: Path, family: str) -> None:
    folder = written(tmp_path / "model", f"model.architecture.model_type={family}")
    ids = AutoTokenizer.from_pretrained(folder)("The ß", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    assert max(ids) < 256


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    found = run_python(SCRIPT, str(tmp_path), "model=tiny-random", cwd=ROOT)
    assert found.stderr == f"{tmp_path} is not empty\n"
