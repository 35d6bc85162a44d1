"""Where weights wait changes nothing of what is computed, and only what is at work is in memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from permllm import job
from permllm.config import ModelConfig
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import perplexity
from permllm.models.families import FAMILIES, decoder_layers, linear_at
from permllm.models.layers import LayerStream, last_states
from permllm.models.load import load_model, meta_model
from permllm.models.mapped_file import MappedFile
from permllm.models.offload import OnDisk, OnHost, placement_of
from permllm.models.source import dense_source
from permllm.pruning import placement as places
from permllm.pruning.footprint import Footprint
from permllm.pruning.methods import methods_of
from permllm.pruning.placement import placement_for
from permllm.runtime import memory, parallel
from tests.conftest import ROOT, run_command, run_python, tiny_model
from tests.test_config import config

PLACEMENTS = ("host", "disk")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("checkpoint"))


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tiny_model(family, dtype=dtype, **changes).save_pretrained(folder, max_shard_size="20KB")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
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


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_states_of_many_samples_are_told_to_be_on_their_way(
    checkpoint: Path, placement: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permllm.models.layers.tqdm", partial(tqdm, disable=False))
    model = load_model(settings(checkpoint, placement), 0).model
    tokens = torch.arange(24).view(6, 4)
    states = last_states(model, tokens, 2, torch.float32)
    assert torch.equal(states, last_states(load_model(settings(checkpoint, "device"), 0).model, tokens, 2, torch.float32))
    assert "dense states:   0%" in capsys.readouterr().err


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


def test_the_next_layer_is_on_its_way_before_anything_of_this_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(settings(saved("llama", tmp_path, num_hidden_layers=4), "host"), 0).model
    seen: list[str] = []
    monkeypatch.setattr(OnHost, "_fetch", lambda _, index: seen.append(f"fetch {index}"))
    stream = LayerStream(model, torch.zeros(4, 8, dtype=torch.long), batch_size=2)
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: seen.append(f"compute {index}"))
    for index in range(2):
        stream.advance(index)
    assert seen == ["fetch 1", "compute 0", "compute 0", "fetch 2", "compute 1", "compute 1"]


def test_the_next_layer_is_the_one_that_came_the_last_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(settings(saved("llama", tmp_path, num_hidden_layers=4), "host"), 0).model
    place = placement_of(model)
    asked: list[int] = []
    monkeypatch.setattr(OnHost, "_fetch", lambda _, index: asked.append(index))

    def visited(*indices: int) -> list[int]:
        asked.clear()
        for index in indices:
            with place.layer(index):
                pass
        return list(asked)

    visited(1, 2, 2, 1)  # a window, forward and backward
    visited(1, 2, 2, 1)
    assert visited(1, 2, 2, 1) == [2, 1, 1, 2]
    visited(0, 1, 2, 3)  # all layers, one pass after the other
    visited(0, 1, 2, 3)
    assert visited(0, 1, 2, 3) == [1, 2, 3, 0]


def test_what_was_replaced_is_not_read_ahead_from_where_it_lay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(settings(checkpoint, "disk"), 0).model
    path = "model.layers.1.mlp.down_proj"
    with placement_of(model).layer(1):
        linear = linear_at(model, path)
        weight = linear.weight.data * 2
        placement_of(model).replace(linear, weight)
        save_file({"changed": weight}, tmp_path / "changed.safetensors")
    asked: list[str] = []
    monkeypatch.setattr(MappedFile, "expect", lambda _, names: asked.extend(names))
    place = placement_of(model)
    assert isinstance(place, OnDisk)
    place.expect(1)
    assert f"{path}.weight" not in asked
    assert "model.layers.1.mlp.up_proj.weight" in asked
    place.lies_in(tmp_path / "changed.safetensors", {linear: "changed"})
    with place.layer(0):
        pass  # the one that is there now is another
    with place.layer(1):
        assert torch.equal(linear.weight, weight)
    asked.clear()
    place.expect(1)
    assert "changed" in asked
    assert f"{path}.weight" not in asked


def test_a_store_that_changes_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    model = load_model(settings(folder, "disk"), 0).model
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="has changed, or is gone, while it was read from"):
        last_states(model, torch.zeros(1, 4, dtype=torch.long), 1, torch.float32)


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
        OnHost(model, torch.device("cpu"))


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


@pytest.mark.parametrize(
    ("device_gb", "host_gb", "chosen", "said"),
    [
        (40.0, 64.0, "device", ""),
        (14.0, 64.0, "host", "model.placement=host, as device needs"),
        (14.0, 12.0, "disk", "host needs"),
        (2.0, 2.0, "disk", "no model.placement fits"),
    ],
)
def test_auto_takes_the_first_placement_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device_gb: float,
    host_gb: float,
    chosen: str,
    said: str,
) -> None:
    monkeypatch.setattr(places, "free_memory", lambda _: int(device_gb * 1e9))
    monkeypatch.setattr(places, "available_host_memory", lambda: int(host_gb * 1e9))
    with caplog.at_level(logging.INFO):
        assert placement_for(planned("model=qwen2.5-7b", device="cuda")) == chosen
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_auto_leaves_what_needs_the_device_there_and_a_random_model_out_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "available_host_memory", lambda: 0)
    for words, expected in ((("reconstruction=distill",), "device"), ((), "host")):
        assert placement_for(planned("model=tiny", *words)) == expected


def planned(*words: str, device: str = "cpu") -> Footprint:
    """Return the plan of a job."""
    asked = config(*words, "logger=none")
    return Footprint(asked, meta_model(asked.model), methods_of(asked), torch.device(device))


def test_processes_share_the_activations_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, one = (planned("model=llama-2-7b", f"permutation.batch_size={size}", device="cuda") for size in (8, 1))
    alone = whole.needs("device").stages["learn"]
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    assert whole.needs("device").stages["learn"] == one.needs("device").stages["learn"] < alone


def test_layers_on_the_host_have_the_states_of_a_text_wait_there() -> None:
    made = planned("model=tiny", "permutation=none", "evaluation.perplexity.limit=1000")
    states = 1000 * made.config.evaluation.perplexity.seqlen * made.model.config.hidden_size * 4
    assert made.needs("host").host >= states > made.needs("device").host


def test_a_control_group_bounds_what_the_host_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = memory.available_host_memory()
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    v1 = "memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "memory/memory.stat", "total_"
    for current, most, parts, prefix in (("memory.current", "memory.max", "memory.stat", ""), v1):
        (tmp_path / current).write_text("41000\n")
        # Pages of files that were read count as taken, and go as soon as something else is asked for.
        (tmp_path / parts).write_text(f"anon 900\n{prefix}inactive_file 30000\n{prefix}active_file 10000\nfile 5\n")
        (tmp_path / most).write_text("max\n")
        assert memory.available_host_memory() == pytest.approx(whole, rel=0.5)
        (tmp_path / most).write_text("51000\n")
        assert memory.available_host_memory() == 50_000
        (tmp_path / most).unlink()


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


EVALUATES = """
import sys, torch
from permllm.evaluation.perplexity import perplexity
from permllm.runtime.memory import host_memory, peak_host_memory, reset_peak_memory
from permllm.runtime.precision import half_products
from tests.conftest import tiny_model
dtype = getattr(torch, sys.argv[1])
model = tiny_model("llama", dtype=dtype, vocab_size=int(sys.argv[2])).eval()
with half_products(dtype, model.device):
    perplexity(model, torch.zeros(1, 8, dtype=torch.long), 8)
    before = host_memory()
    reset_peak_memory(model.device)
    perplexity(model, torch.zeros(2, 1024, dtype=torch.long), 2048)
print(peak_host_memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_plan_knows_the_logits_of_an_evaluation() -> None:
    vocabulary = 40_000
    words = ["model.dtype=bfloat16", f"model.architecture.vocab_size={vocabulary}", "evaluation.perplexity.batch_tokens=2048"]
    stages = planned("model=tiny", "evaluation.perplexity.seqlen=1024", "permutation=none", *words).needs("device").stages
    command = [sys.executable, "-c", EVALUATES, "bfloat16", str(vocabulary)]
    taken = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert stages["perplexity"] - stages["weights"] == pytest.approx(taken, rel=0.15)


WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    overrides = [f"model.architecture.{key}={value}" for key, value in WIDE.items()]
    assert run_python("scripts/random_checkpoint.py", str(folder), "model=tiny", *overrides, cwd=ROOT).returncode == 0
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("placement", "method"),
    [
        ("disk", ["permutation=none"]),
        ("disk", ["permutation=lcp", "permutation.init=random", "permutation.epochs=1"]),
        ("device", ["permutation=none", "mask=score", "mask.epochs=1"]),
        ("device", ["permutation=none", "pruner=sparsegpt"]),
    ],
    ids=["none", "lcp", "score", "sparsegpt"],
)
def test_the_plan_says_what_is_taken(tmp_path: Path, wide: Path, placement: str, method: list[str]) -> None:
    words = ["model=local", f"model.path={wide}", "model.dtype=float32", f"model.placement={placement}", "calibration=builtin"]
    words += ["calibration.samples=4", "calibration.seqlen=64", "evaluation.perplexity.limit=1", "logger=none", *method]
    words += ["evaluation.perplexity.dataset=builtin", "evaluation.perplexity.seqlen=64", "evaluation.tasks=[]"]
    done = run_command(*words, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("runs/*/metrics.json")
    metrics = json.loads(file.read_text())
    planned, peak = metrics["planned_memory_bytes"], metrics["peak_memory_bytes"]
    assert planned == pytest.approx(peak, rel=0.15)
    assert f"{peak / 1e9:.2f} GB at the peak ({planned / 1e9:.2f} GB were planned)" in done.stdout
    if method == ["permutation=none"]:  # the command says what the record does, but for what Python took until then
        plan = run_command(*words, "plan=true", "force=true", cwd=tmp_path, fresh=True)
        assert plan.returncode == 0, plan.stderr
        (row,) = [line for line in plan.stdout.splitlines() if line.startswith("│ peak")]
        assert float(row.split("│")[2 + ("device", "host", "disk").index(placement)]) == pytest.approx(planned / 1e9, rel=0.05)
