"""Broken checkpoints: one line that names file or key, and no foreign code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    ByT5Tokenizer,
    PreTrainedModel,
)

from permllm.errors import ConfigError, DataError
from permllm.export.gathered import write_gathered
from permllm.models.load import load_model, meta_model
from permllm.settings.config import ModelConfig
from permllm.store.files import SUMMARY
from tests.conftest import tiny_config, tiny_model

Tensors, Settings = dict[str, Any], dict[str, Any]
WEIGHTS = "model.safetensors"
UP, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def local(folder: Path, **more: Any) -> ModelConfig:
    return ModelConfig(name="local", source="local", path=str(folder), device="cpu", **more)


def rewrite(folder: Path, tensors: Tensors, name: str = WEIGHTS, **settings: Any) -> None:
    """Replace tensors of a file and settings; None takes a tensor away."""
    file, config = folder / name, folder / "config.json"
    changed = {key: one for key, one in (load_file(file) | tensors).items() if one is not None}
    save_file(changed, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def checked(config: ModelConfig) -> PreTrainedModel:
    """Load a model as a job does."""
    meta_model(config)
    return load_model(config, seed=0).model


def refused(folder: Path, named: str, **more: Any) -> None:
    config = local(folder, **more)
    with pytest.raises((DataError, ConfigError), match=named) as caught:
        checked(config)
    assert "\n" not in str(caught.value)


def poisoned(shape: tuple[int, ...], value: float) -> Tensor:
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = value
    return tensor


BROKEN: dict[str, tuple[Any, Settings, str]] = {
    "a linear is missing": ({UP: None}, {}, f"lacks {UP}"),
    "a tensor too many": ({"x\n": torch.ones(2)}, {}, r"config asks for none, x\\n:"),
    "another shape": ({UP: torch.ones(60, 32)}, {}, f"another shape .* {UP}"),
    "integers": ({UP: torch.ones(64, 32, dtype=torch.int8)}, {}, f"{UP} as I8"),
    "NaN in a norm": ({NORM: poisoned((32,), float("nan"))}, {}, f"{NORM} holds values"),
    "infinity in a linear": ({UP: poisoned((64, 32), -float("inf"))}, {}, f"{UP} holds values"),
    "a layer too many": ({}, {"num_hidden_layers": 1}, r"asks for none, model\.layers\.1\."),
    "quantised": ({}, {"quantization_config": {"quant_method": "x"}}, "quantization_config"),
    "a kernel of the hub": ({}, {"attn_implementation": "a/b"}, "attn_implementation"),
    "weights elsewhere": ({}, {"transformers_weights": "../x.safetensors"}, "transformers_weights"),
    "a type of its own": ({}, {"model_type": "mine"}, "mine"),
    "a size that is text": ({}, {"hidden_size": "x"}, "hidden_size"),
    "a norm that makes NaN": ({}, {"rms_norm_eps": -1e30}, "logits are not finite"),
}


def test_a_gathered_checkpoint_is_refused_as_a_pruned_model(folder: Path) -> None:
    write_gathered(folder, AutoConfig.from_pretrained(folder), {})
    refused(folder, f"{re.escape(str(folder))} is a gathered")


def test_an_export_is_refused_as_a_pruned_model(folder: Path) -> None:
    (folder / SUMMARY).write_text('{"form": "folded"}')
    with pytest.raises(ConfigError, match=f"^{re.escape(str(folder))} is an export"):
        meta_model(local(folder))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(folder: Path, name: str) -> None:
    tensors, settings, named = BROKEN[name]
    rewrite(folder, tensors, **settings)
    refused(folder, named)
    refused(folder, named, placement="disk")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 9999])
def test_garbage_is_one_line(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    # Some a tokenizer reads without this file.
    named = f"transformers cannot load {folder}" if name == "tokenizer_config.json" else name
    refused(folder, named)


def test_a_file_that_is_cut_off_or_missing_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(folder, r"model\.safetensors cannot be read")
    file.unlink()
    refused(folder, "has no weights")
    for name, named in [
        ("../outside", "index"),
        ("no.safetensors", "no.safetensors"),
        (7, "index"),
    ]:
        index = {"weight_map": {UP: name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, named)


def test_a_folder_without_a_tokenizer_or_a_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, f"cannot load {folder}")
    refused(tmp_path / "nothing", "nothing is no checkpoint")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(hidden_size=8, **sizes)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "attends to later tokens")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    # The head has a norm, whose dtype is not that in which heads are compared.
    decoder = BertConfig(hidden_size=8, is_decoder=True, vocab_size=300, **sizes)
    BertLMHeadModel(decoder).save_pretrained(folder)
    refused(folder, "run one at a time")


@pytest.mark.parametrize("known", [True, False], ids=["a known type", "a type of its own"])
def test_no_code_of_it_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    marker = folder / "ran"
    names = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}
    rewrite(folder, {}, auto_map=names, **{} if known else {"model_type": "mine"})
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    tokenizer = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | code))
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    if known:
        load_model(local(folder), seed=0)
    else:
        refused(folder, "cannot load")
    assert not marker.exists()
    assert not asked


class Code:
    """Code that runs where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


WHOLE = dict(tiny_model("llama").state_dict())
PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (Code, "cannot load"),
    "code among tensors": (lambda marker: WHOLE | {"x": Code(marker)}, "cannot load"),
    "a text": (lambda marker: WHOLE | {UP: "x"}, "cannot load"),
    "NaN": (lambda marker: WHOLE | {NORM: WHOLE[NORM] * torch.nan}, f"{NORM} holds values"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickled_weights_are_read_but_their_code_never_runs(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    make, named = PICKLES[name]
    torch.save(make(folder / "ran"), folder / "pytorch_model.bin")
    refused(folder, named)
    assert not (folder / "ran").exists()
    refused(folder, "cannot load|placement=disk", placement="disk")


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 3}, {"model_type": "nonsense"}], ids=str)
def test_a_random_model_that_cannot_work_is_refused(sizes: Settings) -> None:
    architecture = tiny_config("llama") | sizes
    config = ModelConfig("tiny", "random", device="cpu", architecture=architecture)
    with pytest.raises(DataError, match="cannot load") as caught:
        load_model(config, seed=0)
    assert "\n" not in str(caught.value)


def test_tensors_that_transformers_leaves_aside_are_no_fault(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    loaded = load_model(local(folder), seed=0).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in WHOLE.items())
    (folder / "model.safetensors").unlink()
    torch.save(WHOLE, folder / "pytorch_model.bin")
    loaded = load_model(local(folder), seed=0).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in WHOLE.items())


def test_names_without_the_prefix_of_the_model_are_no_way_around(folder: Path) -> None:
    tiny_model("opt").save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): one for name, one in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})  # as OPT's files on the hub have them
    assert load_model(local(folder), seed=0).model is not None
    weight = "decoder.layers.0.fc1.weight"
    save_file(tensors | {weight: tensors[weight].to(torch.int8)}, file, {"format": "pt"})
    refused(folder, f"{weight} as I8")
