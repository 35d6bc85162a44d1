"""Exports in transformers 4: rotary keys, the model that they make, and the tokenizer's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import permllm
from permllm.export.legacy import legacy_rope
from permllm.export.write import export_run
from permllm.settings.config import ExportConfig
from permllm.store.files import read_json, write_json
from tests.conftest import tiny_model
from tests.export.pruned import load, logits, make_run, variant_model
from tests.problems import tokens

LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG: dict[str, Any] = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
OF_LONG = {"original_max_position_embeddings": 4, "max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
TWO_BASES = {
    "full_attention": LINEAR | {"rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
# Family, settings of the model, and the keys that transformers 4 reads.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("llama", {"rope_theta": 500.0}, {"rope_theta": 500.0}),
    "llama3": (
        "llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    ),
    "two bases": (
        "gemma3_text",
        {"rope_parameters": TWO_BASES},
        {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR},
    ),
    "partial": (
        "phi3",
        {"rope_parameters": PARTIAL},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    # transformers 4 refuses other keys of `rope_scaling` for these two families.
    "longrope": (
        "phi3",
        {"rope_parameters": LONG | {"rope_type": "longrope", "rope_theta": 500.0}} | OF_LONG,
        {"rope_theta": 500.0, "rope_scaling": LONG | {"type": "longrope"}},
    ),
    "olmo2": (
        "olmo2",
        {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "none": ("opt", {}, {}),
}
# From the keys of transformers 4 transformers 5 would read another embedding for GPT-NeoX.
SCALED = LINEAR | {"rope_theta": 500.0, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_exported_config_has_the_rotary_keys_of_transformers_4(
    name: str, tmp_path: Path
) -> None:
    family, settings, wanted = CASES[name]
    model = variant_model(family, **settings)
    run = make_run(tmp_path, model, "foldable")
    export_run(run, ExportConfig("folded"), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    written = read_json(file)
    keys = {"rope_theta", "rope_local_base_freq", "rope_scaling"} & written.keys()
    assert {key: written[key] for key in keys | wanted.keys()} == wanted

    # transformers 5 reads the keys of transformers 4. Alone they make the same model.
    exported = logits(load(tmp_path / "out"))
    for key in ("rope_parameters", *wanted):
        written.pop(key, None)
    write_json(file, written | wanted)
    assert torch.equal(logits(load(tmp_path / "out")), exported)
    if wanted:
        write_json(file, written)
        assert not torch.allclose(logits(load(tmp_path / "out")), exported)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_transformers_5_still_reads_the_rotary_embedding(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, rope_parameters=dict(SCALED))
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    write_json(file, read_json(file) | legacy_rope(config))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == SCALED


def test_a_tokenizer_has_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    words = {"<unk>": 0, "a": 1, "b": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = tiny_model("llama")
    permllm.prune(model, tokenizer, texts=tokens(), permutation="none", compute_dtype="float32")
    permllm.save(model, tmp_path / "export")
    settings = read_json(tmp_path / "export" / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded("b a c")["input_ids"] == [2, 1, 0]
