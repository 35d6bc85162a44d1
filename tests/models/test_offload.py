"""Placements of weights change nothing of what is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as BytePairs
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from permllm import job
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import measure_perplexity
from permllm.models.families import decoder_layers, linear_at
from permllm.models.load import load_model
from permllm.models.offload import placement_of
from permllm.models.source import dense_source
from tests.conftest import tiny_model
from tests.models.test_bad_checkpoints import local
from tests.settings.test_config import config

PLACEMENTS = ("host", "disk")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("checkpoint"))


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tiny_model(family, dtype=dtype, **changes).save_pretrained(folder, max_shard_size="20KB")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate(letters)}
    tokenizer = BytePairs(models.BPE(numbers, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    # Every family's class reads such a file.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "of_files", "dtype"),
    [
        ("gemma3_text", "float32", "float32"),
        ("opt", "bfloat16", "bfloat16"),
        ("phi3", "bfloat16", "float32"),
    ],
)
def test_perplexity_has_the_same_bits(
    tmp_path: Path, family: str, of_files: str, dtype: str
) -> None:
    folder = saved(family, tmp_path, getattr(torch, of_files))
    windows = torch.randint(0, 259, (5, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for placement in ("device", *PLACEMENTS):
        model = load_model(local(folder, placement=placement, dtype=dtype), 0).model
        found.append(measure_perplexity(model, windows, 32))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_are_there_inside_of_their_layer_or_all_alone(
    checkpoint: Path, placement: str
) -> None:
    ids = torch.arange(12).view(2, 6)
    dense = load_model(local(checkpoint, placement="device"), 0).model
    model = load_model(local(checkpoint, placement=placement), 0).model
    (first, second), place = decoder_layers(model), placement_of(model)
    expected = dict(decoder_layers(dense)[1].named_parameters())
    with place.layer(1), place.layer(1):
        with place.layer(1):
            pass
        assert all(torch.equal(value, expected[name]) for name, value in second.named_parameters())
        assert all(parameter.is_meta for parameter in first.parameters())
    with place.layer(0):
        assert all(parameter.is_meta for parameter in second.parameters())
    with place.whole():
        assert torch.equal(model(ids).logits, dense(ids).logits)
        found = [one.generate(ids, max_new_tokens=3) for one in (model, dense)]
        assert torch.equal(*found)
    with pytest.raises(RuntimeError):
        model(ids)


def test_generation_settings_come_from_the_files(tmp_path: Path) -> None:
    export = saved("llama", tmp_path)
    windows = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    config = json.loads((export / "config.json").read_text())
    # Without a file of their own they may stand in the config, whose class drops them.
    for file, settings_of in (("generation_config.json", {}), ("config.json", config)):
        (export / file).write_text(json.dumps(settings_of | {"repetition_penalty": 1.5}))
        models = [load_model(local(export, placement=one), 0).model for one in ("device", "disk")]
        on_device, on_disk = (measure_perplexity(model, windows, 32) for model in models)
        assert on_device == on_disk
        source = dense_source(local(export, placement="device"), 0)
        generations = [model.generation_config for model in (*models, source.skeleton)]
        assert {one.repetition_penalty for one in generations if one} == {1.5}
        (export / "generation_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["pickled", "an own head"])
def test_files_without_the_models_tensors_are_not_read_by_layer(tmp_path: Path, kind: str) -> None:
    folder, model = saved("gemma3_text", tmp_path), tiny_model("gemma3_text")
    for file in (*folder.glob("*.index.json"), *folder.glob("*.safetensors")):
        file.unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "pickled":
        torch.save(state, folder / "pytorch_model.bin")
    else:  # which the config ties to the embedding
        state["lm_head.weight"] += 1
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"^model\.placement=disk"):
        load_model(local(folder, placement="disk"), 0)
    loaded = load_model(local(folder, placement="host"), 0).model
    assert torch.equal(loaded.get_output_embeddings().weight, state["lm_head.weight"])


METHODS = {
    "learned": "permutation=lcp permutation.layers_per_stage=1 block_size=16 reconstruction=obs "
    "mask=score mask.layers_per_stage=1 allocation=sensitive allocation.share=0.3",
    "gumbel": "permutation=heuristic mask=gumbel",
    "sequential": "pruner=sparsegpt permutation=heuristic permutation.constraint=foldable "
    "calibration.statistics=sequential",
}


def run(checkpoint: Path, folder: Path, placement: str, *words: str) -> dict[str, Any]:
    """The record of a run of its own directory for each placement; they share a cache."""
    directory = folder / placement
    same = ["model=local", f"model.path={checkpoint}", "model.device=cpu", "logger=none"]
    same += ["calibration=builtin", "evaluation=builtin", "budget.epochs=1"]
    same += ["calibration.samples=6", "calibration.seqlen=32", "evaluation.perplexity.limit=3"]
    same += [f"model.placement={placement}", f"run_dir={directory}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(folder / "cache"))
        result = job.run(config(*same, *words))
    assert result is not None
    return result.metrics


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_gives_the_same_model(tmp_path: Path, checkpoint: Path, method: str) -> None:
    placements, words = ("device", *PLACEMENTS), METHODS[method].split()
    records = [run(checkpoint, tmp_path, placement, *words) for placement in placements]
    for record in records[1:]:
        for key in ("perplexity", "retained_saliency", "output_error", "sparsity", "config_hash"):
            assert record[key] == records[0][key], key
    files = ["permutations.safetensors", "masks.safetensors"]
    if method == "sequential":  # made again from its record
        again = [*words, "evaluation.perplexity.limit=2", "export=folded"]
        found = [run(checkpoint, tmp_path, one, *again)["perplexity"] for one in placements]
        assert found[0] == found[1] == found[2]
        files.append("export/model.safetensors")
    for file in files:
        contents = {(tmp_path / one / file).read_bytes() for one in placements}
        assert len(contents) == 1, file


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_weight_is_rearranged_and_replaced(
    checkpoint: Path, tmp_path: Path, placement: str
) -> None:
    model = load_model(local(checkpoint, placement=placement), 0).model
    place, linear = placement_of(model), linear_at(model, "model.layers.1.mlp.down_proj")

    def weight() -> Tensor:
        with place.layer(0):
            pass  # what is there must come again
        with place.layer(1):
            return linear.weight.data

    dense = weight().clone()
    place.rearrange(linear, torch.neg)
    assert torch.equal(linear.weight, -dense)  # the layer that was left last
    assert torch.equal(weight(), -dense)
    with place.layer(0):
        place.restore(linear, torch.neg)
    assert torch.equal(weight(), dense)
    mask = dense > 0
    for new, given in ((dense * mask, lambda: mask), (dense * 2, None)):
        with place.layer(1):
            place.replace(linear, new, given)
            assert torch.equal(linear.weight, new)
        assert torch.equal(weight(), new)
    save_file({"changed": dense * 2}, tmp_path / "changed.safetensors")
    place.read_from(tmp_path / "changed.safetensors", {linear: "changed"})
    assert torch.equal(weight(), dense * 2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_graph_keeps_the_weights_that_it_was_made_with(checkpoint: Path, placement: str) -> None:
    gradients = []
    for one in ("device", placement):
        model = load_model(local(checkpoint, placement=one), 0).model
        place, linear = placement_of(model), linear_at(model, "model.layers.0.mlp.up_proj")
        states = torch.ones(2, linear.in_features, requires_grad=True)
        with place.layer(0):
            made = linear(states).square().sum()
            if one == placement:
                place.replace(linear, linear.weight * 3)
        with place.layer(1):
            pass
        made.backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "damage", [lambda file: os.truncate(file, 4000), Path.unlink], ids=["cut off", "gone"]
)
def test_a_file_that_was_damaged_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = saved("llama", tmp_path)
    model = load_model(local(folder, placement="disk"), 0).model
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    damage(file)
    with pytest.raises(DataError, match=file.name), placement_of(model).layer(0):
        pass
