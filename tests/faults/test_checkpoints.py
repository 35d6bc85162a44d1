"""Checkpoints that are not what their config says are refused before anything is computed, in one line that names what."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ByT5Tokenizer

from permllm import bench
from permllm.config import ModelConfig
from permllm.errors import ConfigError, DataError
from permllm.models.checkpoint import transformers_reads
from permllm.models.loading import load_model
from permllm.verify import logits_difference
from tests.conftest import tiny_model

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
UP, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"


def poisoned(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


BROKEN: dict[str, tuple[Change, str]] = {
    "a linear is missing": (lambda tensors, config: tensors.pop(UP), f"lacks {UP}"),
    "the head is missing": (lambda tensors, config: tensors.pop(HEAD), f"lacks {HEAD}"),
    "a norm is missing": (lambda tensors, config: tensors.pop(NORM), f"lacks {NORM}"),
    "renamed": (lambda tensors, config: tensors.update({"up": tensors.pop(UP)}), f"lacks {UP}"),
    "a stranger": (lambda tensors, config: tensors.update({"x.weight": torch.zeros(2, 2)}), "asks for none, x.weight"),
    "another shape": (lambda tensors, config: tensors.update({UP: torch.zeros(60, 32)}), f"another shape .* {UP}"),
    "fewer layers": (
        lambda tensors, config: config.update(num_hidden_layers=1),
        r"asks for none, model\.layers\.1\..* 6 more",
    ),
    "more layers": (lambda tensors, config: config.update(num_hidden_layers=3), r"lacks model\.layers\.2\..* and 6 more"),
    "biases": (lambda tensors, config: config.update(attention_bias=True), r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
    "no width": (lambda tensors, config: config.update(intermediate_size=0), "another shape"),
    "other heads": (lambda tensors, config: config.update(num_key_value_heads=3), "another shape"),
    "whole numbers": (lambda tensors, config: tensors.update({UP: tensors[UP].to(torch.int8)}), f"{UP} as I8: quantised"),
    "8 bits": (lambda tensors, config: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}), f"{UP} as F8_E4M3"),
    "quantised": (lambda tensors, config: config.update(quantization_config={"quant_method": "x"}), "quantization_config"),
    "NaN in a norm": (poisoned(NORM, float("nan")), f"{NORM} holds values that are not finite"),
    "infinite head": (poisoned(HEAD, float("inf")), f"{HEAD} holds values that are not finite"),
    "minus infinity": (poisoned(UP, float("-inf")), f"{UP} holds values that are not finite"),
    "a size that is text": (lambda tensors, config: config.update(hidden_size="x"), "hidden_size"),
    "a size that is nothing": (lambda tensors, config: config.update(hidden_size=None), "hidden_size"),
    "a list": (lambda tensors, config: config.update(vocab_size=[1]), "vocab_size"),
    "no activation": (lambda tensors, config: config.update(hidden_act="nope"), "nope"),
    "no rope": (lambda tensors, config: config.update(rope_scaling={"type": "nope"}), "nope"),
}


def checkpoint(folder: Path, change: Change) -> ModelConfig:
    tiny_model("llama").save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(name="local", source="local", path=str(folder), device="cpu")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    config = checkpoint(tmp_path, change)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load_model(config, seed=0)
    assert "\n" not in str(caught.value)


def test_what_transformers_leaves_aside_is_no_stranger(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert load_model(checkpoint(tmp_path, lambda tensors, config: tensors.update(old)), seed=0).model is not None


def test_a_gpu_that_is_too_small_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), transformers_reads(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("known", [True, False], ids=["a known type", "a type of its own"])
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    names = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine", "AutoTokenizer": ["code.Mine", None]}
    more = {"auto_map": names} | ({} if known else {"model_type": "mine"})
    config = checkpoint(folder, lambda tensors, config: config.update(more))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a person in a hurry answers, where they are asked
    for read in (
        lambda: load_model(config, seed=0),
        lambda: logits_difference(folder, folder),
        lambda: bench.load(folder, torch.device("cpu"), None),
    ):
        with nullcontext() if known else pytest.raises(DataError, match="transformers cannot load"):
            read()
    assert not marker.exists()
