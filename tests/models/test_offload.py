"""Where weights wait changes nothing of what is computed, and only what is at work is in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BytePairs
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from permllm import job
from permllm.config import ModelConfig
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import perplexity
from permllm.models.checkpoint import tensor_places, weight_files
from permllm.models.families import FAMILIES, decoder_layers, linear_at
from permllm.models.layers import LayerStream, last_states
from permllm.models.load import load_model
from permllm.models.offload import Offloaded, placement_of
from permllm.models.source import dense_source
from tests.conftest import ROOT, run_python, tiny_model
from tests.test_config import config

PLACEMENTS = ("host", "disk")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("checkpoint"))


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tiny_model(family, dtype=dtype, **changes).save_pretrained(folder, max_shard_size="20KB")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = BytePairs(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # which every family's class reads
    return folder


def settings(folder: Path, placement: str, **more: Any) -> ModelConfig:
    return ModelConfig(**{"name": "x", "source": "local", "path": str(folder), "device": "cpu", "placement": placement} | more)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_is_the_same_to_the_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = saved(family, tmp_path, dtype)
    windows = torch.randint(0, 259, (5, 16), generator=torch.Generator().manual_seed(0))
    name = str(dtype).removeprefix("torch.")
    found = [
        perplexity(load_model(settings(folder, placement, dtype=name), 0).model, windows, 32)
        for placement in ("device", *PLACEMENTS)
    ]
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_files_of_another_format_give_the_weights_that_loading_gives(tmp_path: Path) -> None:
    folder = saved("qwen2", tmp_path, torch.bfloat16)
    windows = torch.randint(0, 259, (3, 16), generator=torch.Generator().manual_seed(0))
    models = [load_model(settings(folder, one, dtype="float32"), 0).model for one in ("device", *PLACEMENTS)]
    found = [perplexity(model, windows, 32) for model in models]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_models_own_forward_finds_its_layers(checkpoint: Path, placement: str) -> None:
    ids = torch.arange(12).view(2, 6)
    dense = load_model(settings(checkpoint, "device"), 0).model
    model = load_model(settings(checkpoint, placement), 0).model
    with placement_of(model).whole():
        assert torch.equal(model(ids).logits, dense(ids).logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3), dense.generate(ids, max_new_tokens=3))
    with pytest.raises(RuntimeError):
        model(ids)


def test_orders_and_generation_settings_come_from_the_files(tmp_path: Path, checkpoint: Path) -> None:
    words = [*METHODS["heuristic"], "export=gathered"]
    run(checkpoint, tmp_path, "device", *words)
    gathered = tmp_path / "device" / "export"
    (gathered / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    windows = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    models = [load_model(settings(gathered, one), 0).model for one in ("device", "disk")]
    assert perplexity(models[0], windows, 32) == perplexity(models[1], windows, 32)
    assert models[1].generation_config is not None
    assert models[1].generation_config.repetition_penalty == 1.5
    # Where they have no file of their own they may stand in the config, whose class drops them when it is read.
    (gathered / "generation_config.json").unlink()
    config = json.loads((gathered / "config.json").read_text())
    (gathered / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.25}))
    models = [load_model(settings(gathered, one), 0).model for one in ("device", "disk")]
    source = dense_source(settings(gathered, "device"), 0)
    penalties = [found.repetition_penalty for found in (*(model.generation_config for model in models), source.generation)]
    assert penalties == [1.25] * 3


def test_a_head_that_is_another_than_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    assert model.config.tie_word_embeddings
    saved("gemma3_text", tmp_path)
    file = next(file for file in tmp_path.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(file))
    save_file(load_file(file) | {"lm_head.weight": torch.randn(259, model.config.hidden_size)}, file, {"format": "pt"})
    (index,) = tmp_path.glob("*.index.json")
    entries = json.loads(index.read_text())
    entries["weight_map"]["lm_head.weight"] = file.name
    index.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="which are tied: take host"):
        load_model(settings(tmp_path, "disk"), 0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_are_there_inside_of_their_layer_alone(checkpoint: Path, placement: str) -> None:
    dense = load_model(settings(checkpoint, "device"), 0).model
    model = load_model(settings(checkpoint, placement), 0).model
    layer, place = decoder_layers(model)[1], placement_of(model)
    with place.layer(0):
        assert all(parameter.is_meta for parameter in layer.parameters())
    with place.layer(1), place.layer(1):
        expected = dict(decoder_layers(dense)[1].named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in layer.named_parameters())
        with place.layer(1):
            pass
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in decoder_layers(model)[0].parameters())
    with place.layer(0):
        assert all(parameter.is_meta for parameter in layer.parameters())


METHODS = {
    "heuristic": ["permutation=heuristic"],
    "sequential": ["permutation=none", "calibration.statistics=sequential"],
    "lcp": ["permutation=lcp", "permutation.epochs=2", "block_size=16"],
    "lcp-stages": ["permutation=lcp", "permutation.layers_per_stage=1", "block_size=16"],
    "score": ["permutation=heuristic", "mask=score", "mask.epochs=2"],
    "lowrank": ["permutation=heuristic", "mask=lowrank", "mask.layers_per_stage=1"],
    "refined": ["permutation=heuristic", "mask=refined"],
    "obs": ["permutation=heuristic", "reconstruction=obs"],
    "sparsegpt": ["pruner=sparsegpt", "permutation=heuristic"],
}


def run(checkpoint: Path, folder: Path, placement: str, *words: str) -> dict[str, Any]:
    """The record of a run of its own directory for each placement; they share a cache."""
    directory = folder / placement
    of_model = ["model=local", f"model.path={checkpoint}", "model.architecture=null", "model.device=cpu"]
    same = ["calibration=builtin", "evaluation=builtin", "logger=none", f"model.placement={placement}", f"run_dir={directory}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(folder / "cache"))
        result = job.run(config(*of_model, *same, *words))
    assert result is not None
    return result[0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_stage_gives_the_same_model(tmp_path: Path, checkpoint: Path, method: str) -> None:
    records = {placement: run(checkpoint, tmp_path, placement, *METHODS[method]) for placement in ("device", *PLACEMENTS)}
    for placement in PLACEMENTS:
        for key in ("perplexity", "retained_saliency", "output_error", "sparsity", "config_hash"):
            assert records[placement][key] == records["device"][key], (placement, key)
        for file in ("permutations.safetensors", "masks.safetensors"):
            assert (tmp_path / placement / file).read_bytes() == (tmp_path / "device" / file).read_bytes()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("method", ["heuristic", "obs"])
def test_a_pruned_model_is_made_again_from_its_record_and_exported(
    tmp_path: Path, checkpoint: Path, method: str, placement: str
) -> None:
    words = ["permutation.constraint=foldable", *METHODS[method]]
    run(checkpoint, tmp_path, placement, *words)
    again = run(checkpoint, tmp_path, placement, *words, "evaluation.perplexity.limit=3", "export=folded")
    device = run(checkpoint, tmp_path, "device", *words, "evaluation.perplexity.limit=3", "export=folded")
    assert device["perplexity"] == again["perplexity"]
    of_export = [tmp_path / one / "export" / "model.safetensors" for one in (placement, "device")]
    assert of_export[0].read_bytes() == of_export[1].read_bytes()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_weight_is_stored_in_another_way_and_replaced(checkpoint: Path, tmp_path: Path, placement: str) -> None:
    model = load_model(settings(checkpoint, placement), 0).model
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
    place.lies_in(tmp_path / "changed.safetensors", {linear: "changed"})
    assert torch.equal(weight(), dense * 2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_graph_keeps_the_weights_that_it_was_made_with(checkpoint: Path, placement: str) -> None:
    gradients = []
    for one in ("device", placement):
        model = load_model(settings(checkpoint, one), 0).model
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


class Stream:
    """A GPU's stream, whose events are there at once."""

    def wait_stream(self, _: Stream) -> None:
        """Have nothing to wait for."""

    def record_event(self) -> Stream:
        """Give an event."""
        return self

    synchronize = record_event


@pytest.fixture
def fetched(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, list[str]]:
    """A model of four layers that fetches ahead as on a GPU, and what it reads."""
    model = load_model(settings(saved("llama", tmp_path, num_hidden_layers=4), "host"), 0).model
    place, seen = placement_of(model), list[str]()
    assert isinstance(place, Offloaded)
    values = place._values
    monkeypatch.setattr(place, "_values", lambda index: (seen.append(f"read {index}"), values(index))[1])
    monkeypatch.setattr(place, "_stream", Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return model, seen


def test_the_next_layer_is_on_its_way_before_this_one_computes(fetched: tuple[PreTrainedModel, list[str]]) -> None:
    model, seen = fetched
    stream = LayerStream(model, torch.zeros(4, 8, dtype=torch.long), batch_size=2)
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: seen.append(f"compute {index}"))
    for index in range(2):
        stream.advance(index)
    assert seen == ["read 0", "read 1", "compute 0", "compute 0", "read 2", "compute 1", "compute 1"]


def test_the_next_layer_is_that_in_the_same_direction(fetched: tuple[PreTrainedModel, list[str]]) -> None:
    model, seen = fetched
    for index in (0, 1, 2, 3, 3, 2, 1, 0):
        with placement_of(model).layer(index):
            pass
    assert seen == [f"read {index}" for index in (0, 1, 2, 3, 2, 1, 0, 1)]


def test_what_was_replaced_does_not_come_as_it_was_fetched(fetched: tuple[PreTrainedModel, list[str]]) -> None:
    model, _ = fetched
    place, linear = placement_of(model), linear_at(model, "model.layers.1.mlp.down_proj")
    with place.layer(1):
        dense = linear.weight.data
    with place.layer(0):  # layer 1 is on its way
        place.rearrange(linear, torch.neg)
    with place.layer(1):
        assert torch.equal(linear.weight, -dense)


def test_a_file_that_is_cut_off_or_gone_is_named(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-8]), Path.unlink):
        model = load_model(settings(folder, "disk"), 0).model
        (file,) = {places[0] for name, places in tensor_places(weight_files(folder)).items() if name == UP}
        whole = file.read_bytes()
        damage(file)
        with pytest.raises(DataError, match=file.name):
            last_states(model, torch.zeros(1, 4, dtype=torch.long), 1, torch.float32)
        file.write_bytes(whole)


def test_what_cannot_be_read_from_disk_is_said(tmp_path: Path, checkpoint: Path) -> None:
    folder = saved("llama", tmp_path / "one")
    (index,) = folder.glob("*.index.json")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    index.unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.placement=disk reads safetensors files"):
        load_model(settings(folder, "disk"), 0)


def test_parameters_that_layers_share_are_refused() -> None:
    model = tiny_model("llama")
    first, second = decoder_layers(model)
    second.mlp.up_proj.weight = first.mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(
        ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is model\.layers\.0\.mlp\.up_proj\.weight as well"
    ):
        Offloaded(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.placement=shelf"], "model.placement='shelf': must be 'auto', 'device', 'sharded', 'host' or 'disk'"),
        (["model.placement=disk"], "model.placement=disk needs a model with files, and model=tiny is random: take host"),
        (["model.placement=host", "reconstruction=distill"], "reconstruction: Distill trains all kept weights together"),
    ],
)
def test_what_a_placement_cannot_do_is_one_line(tmp_path: Path, words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job.run(config("model=tiny", "logger=none", f"run_dir={tmp_path}/run", *words))
    assert str(caught.value).startswith(reason)


LAYERS, HIDDEN, INTERMEDIATE = 12, 512, 2048
CHILD = """
import sys, torch
from permllm.config import ModelConfig, RunConfig
from permllm.models.layers import last_states
from permllm.models.load import load_model
from permllm.runtime.memory import peak_host_memory, reset_peak_memory

torch.ones(64, 64) @ torch.ones(64, 64)
before = int(open("/proc/self/statm").read().split()[1]) * 4096
reset_peak_memory(torch.device("cpu"))
model = load_model(ModelConfig(name="x", source="local", path=sys.argv[1], device="cpu", placement=sys.argv[2]), 0).model
last_states(model, torch.zeros(2, 8, dtype=torch.long), 1, torch.float32)
print(peak_host_memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_only_what_is_at_work_is_in_memory(tmp_path: Path) -> None:
    words = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_key_value_heads": 4}
    overrides = [f"model.architecture.{key}={value}" for key, value in words.items()]
    command = ["scripts/random_checkpoint.py", str(tmp_path / "model"), "model=tiny", *overrides]
    assert run_python(*command, cwd=ROOT).returncode == 0

    def grown(placement: str) -> int:
        command = [sys.executable, "-c", CHILD, str(tmp_path / "model"), placement]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    layer = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    assert grown("device") - grown("disk") > (LAYERS - 3) * layer
