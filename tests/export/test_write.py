"""Checkpoints: what transformers computes with each form, what is stored, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM

import permllm
from permllm.cli import call
from permllm.errors import ConfigError, DataError
from permllm.export.gathered import GATHERS
from permllm.export.verify import verify
from permllm.export.write import SUMMARY, export_run, present_export
from permllm.models.families import channel_groups, decoder_layers, linear_at
from permllm.runtime.files import file_sha256
from permllm.settings.config import ExportConfig
from permllm.sparsity.nm import violations
from permllm.store.files import read_json, write_json, write_text
from permllm.store.tensors import save_tensors
from tests.conftest import run_python
from tests.export.pruned import (
    TWO_OF_FOUR,
    VARIANTS,
    change_metrics,
    load,
    logits,
    make_run,
    reference,
    relative,
    take_as_pruned,
    variant_model,
)
from tests.models.test_bad_checkpoints import WEIGHTS


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_folded_models_are_stock_and_compute_what_simulate_does(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model(name), "foldable")
    for form in ("folded", "simulate"):
        export_run(run, ExportConfig(form), tmp_path / form)
    folded, simulated = load(tmp_path / "folded"), load(tmp_path / "simulate")
    assert type(folded).__module__.startswith("transformers.")
    assert relative(logits(folded), logits(simulated)) < 1e-5
    pruned = reference(variant_model(name), run).state_dict()
    assert all(torch.equal(value, pruned[key]) for key, value in simulated.state_dict().items())
    for path in (path for group in channel_groups(folded) for path in group.members):
        weight = linear_at(folded, path).weight
        assert violations(weight, None, TWO_OF_FOUR) == 0, path
        assert float((weight == 0).float().mean()) == 0.5
        assert not (weight.signbit() & (weight == 0)).any()
        assert not torch.equal(weight, pruned[f"{path}.weight"])


def test_folding_leaves_only_rounding(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with norms in float64, which transformers computes in float32."""
    double = {"dtype": torch.float64}
    pruned = reference(load(exports / "of-folded/dense", **double), exports / "of-folded/run")
    call_module: Any = nn.Module.__call__

    def norms_in_float64(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not type(module).__name__.endswith("RMSNorm"):
            return call_module(module, *args, **kwargs)
        mean = args[0].pow(2).mean(-1, keepdim=True)
        return module.weight * args[0] * torch.rsqrt(mean + module.variance_epsilon)

    monkeypatch.setattr(nn.Module, "__call__", norms_in_float64)
    assert relative(logits(load(exports / "folded", **double)), logits(pruned)) < 1e-10


@pytest.mark.parametrize("name", ["gemma3_text", "llama-biases", "opt-projected", "qwen3-tied"])
def test_gathered_models_keep_any_order(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model(name), "free")
    summary = export_run(run, ExportConfig("gathered"), tmp_path / "out")
    pruned, gathered = reference(variant_model(name), run), load(tmp_path / "out")
    assert relative(logits(gathered), logits(pruned)) < 1e-5
    # Two readers of the residual stream and the attention output of each layer; the MLP's inner
    # order folds.
    assert summary["gathers"] == 3 * len(decoder_layers(pruned))
    assert verify(tmp_path / "out")["passed"]
    prompt = torch.tensor([[5, 6, 7]])
    ours, theirs = (one.generate(prompt, max_new_tokens=4) for one in (gathered, pruned))
    assert torch.equal(ours, theirs)
    half = load(tmp_path / "out", dtype=torch.bfloat16, device_map="cpu")
    assert (half.dtype, len(half.state_dict())) == (torch.bfloat16, len(pruned.state_dict()))


def test_a_gathered_model_is_saved_and_cached_with_its_orders(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or transformers asks the hub for an adapter, although it may read local files only.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    gathered = load(exports / "gathered")
    gathered.save_pretrained(tmp_path / "again")
    cached = tmp_path / "models--some--model"  # as the hub's client keeps it
    write_text(cached / "refs" / "main", "0" * 40)
    shutil.copytree(exports / "gathered", cached / "snapshots" / ("0" * 40))
    hub = load(Path("some/model"), cache_dir=tmp_path, local_files_only=True)
    for one in (load(tmp_path / "again"), hub):
        assert torch.equal(logits(one), logits(gathered))


def test_a_gathered_checkpoint_has_no_weights_for_another_config(
    exports: Path, tmp_path: Path
) -> None:
    """As files of one folder read with the config of another, in several shards too."""
    run = exports / "of-gathered" / "run"
    export_run(run, ExportConfig("gathered", shard_gb=2e-5), tmp_path / "shards")
    gathered = load(exports / "gathered")
    assert torch.equal(logits(load(tmp_path / "shards")), logits(gathered))
    gathered.save_pretrained(tmp_path / "again")
    config = AutoConfig.from_pretrained(exports / "folded")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # down_proj folds
    for folder in (exports / "gathered", tmp_path / "shards", tmp_path / "again"):
        options = {"config": config, "output_loading_info": True}
        _, report = LlamaForCausalLM.from_pretrained(folder, **options)
        lacking = {name.split(".", 3)[-1] for name in report["missing_keys"]}
        assert {name.split(".")[1] for name in lacking} == set(names)
        assert len(report["missing_keys"]) == len(names) * config.num_hidden_layers


# A process in which this package cannot be imported.
STOCK = """
import sys
sys.modules["permllm"] = None
import torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.arange(48).view(2, 24)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/folded", dtype=torch.float32)
torch.save(model(input_ids=ids).logits.detach(), sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(f"{folder}/gathered")
except Exception as error:
    print(error)
"""


def test_without_permllm_a_folded_checkpoint_loads_and_a_gathered_one_says_what_to_import(
    exports: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", STOCK, str(exports), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "import permllm.export" in done.stdout
    with torch.no_grad():
        ours = load(exports / "folded")(input_ids=torch.arange(48).view(2, 24)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours)


# What the process grows by over its memory after the imports: all pages, those of mapped files too.
GROWTH = """
import sys
from pathlib import Path
import torch
from permllm.export.write import export_run
from permllm.runtime.memory import peak_host_memory, reset_peak_memory
from permllm.settings.config import ExportConfig
reset_peak_memory(torch.device("cpu"))
before = peak_host_memory()
settings = ExportConfig("folded", shard_gb=float(sys.argv[3]))
export_run(Path(sys.argv[1]), settings, Path(sys.argv[2]))
print(peak_host_memory() - before)
"""


def growth_of_export(run: Path, shard: int) -> int:
    command = [sys.executable, "-c", GROWTH, str(run), str(run / "out"), str(shard / 1e9)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_export_takes_the_memory_of_a_layer_and_a_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4}
    model = variant_model("llama", torch.bfloat16, num_attention_heads=16, **sizes)
    layer = sum(parameter.nbytes for parameter in decoder_layers(model)[0].parameters())
    shard = layer // 2
    # Code that is imported late takes memory with any model.
    small = make_run(tmp_path / "small", variant_model("llama", torch.bfloat16), "foldable")
    fixed = growth_of_export(small, shard)
    growth = growth_of_export(make_run(tmp_path / "large", model, "foldable"), shard)
    assert 0 < growth - fixed < layer + shard, (fixed, growth)


# A layer, a member of a group, and a group of the residual stream stay dense.
BY_NAME = ("layers.1.mlp", "v_proj", "layers.0.mlp.gate_up_proj")
PARTS = {
    "llama-biases": BY_NAME,
    "opt-projected": ("-1", "q_proj"),
}


@pytest.mark.parametrize("form", ["folded", "gathered"])
@pytest.mark.parametrize("name", sorted(PARTS))
def test_what_stays_dense_follows_orders_around_it(name: str, form: str, tmp_path: Path) -> None:
    constraint = "foldable" if form == "folded" else "free"
    run = make_run(tmp_path, variant_model(name), constraint, TWO_OF_FOUR, PARTS[name])
    export_run(run, ExportConfig(form), tmp_path / "out")
    pruned = logits(reference(variant_model(name), run))
    assert relative(logits(load(tmp_path / "out")), pruned) < 1e-5
    report, told = verify(tmp_path / "out"), read_json(run / "metrics.json")["sparsity"]["patterns"]
    assert report["passed"], report["problems"]
    assert report["dense"] == sorted(f"{path}.weight" for path in told)
    state = {  # by hand, from the file alone
        name.replace(".permuted_weight", ".weight"): tensor
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert all(bool((state[name] != 0).all()) for name in report["dense"])
    for layer in report["layers"]:
        assert int((state[layer["name"]] != 0).view(-1, 4).sum(1).max()) == 2


def test_changed_weights_are_exported_in_shards(tmp_path: Path) -> None:
    model = variant_model("llama")
    run = make_run(tmp_path, model, "foldable")
    members = [path for group in channel_groups(model) for path in group.members]
    torch.manual_seed(5)
    weights = {path: torch.randn_like(linear_at(model, path).weight) for path in members}
    file = run / "weights/00000.safetensors"
    save_tensors(file, weights)
    metrics = read_json(run / "metrics.json")
    changed = {"weights_changed": True}
    digests = metrics["sha256"] | {"weights/00000.safetensors": file_sha256(file)}
    change_metrics(run, sparsity=metrics["sparsity"] | changed, sha256=digests)
    export_run(run, ExportConfig("folded", shard_gb=2e-5), tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    pruned = reference(variant_model("llama"), run)
    assert relative(logits(load(tmp_path / "out")), logits(pruned)) < 1e-5


def as_the_hub_has_it(dense: Path) -> None:
    state = load_file(dense / WEIGHTS)
    state = {name.removeprefix("model."): value for name, value in state.items()}
    save_file(state, dense / WEIGHTS, {"format": "pt"})


def with_a_head_apart_from_its_tie(dense: Path) -> None:
    config = read_json(dense / "config.json")
    write_json(dense / "config.json", config | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("name", "change"), [("opt", as_the_hub_has_it), ("llama", with_a_head_apart_from_its_tie)]
)
def test_a_dense_checkpoint_as_others_write_it_is_exported(
    name: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    run = make_run(tmp_path, variant_model(name), "foldable")
    change(tmp_path / "dense")
    take_as_pruned(run, tmp_path / "dense")
    export_run(run, ExportConfig("folded"), tmp_path / "out")
    pruned = logits(reference(load(tmp_path / "dense"), run))
    assert relative(logits(load(tmp_path / "out")), pruned) < 1e-5


def test_what_lies_beside_the_weights(exports: Path, tmp_path: Path) -> None:
    run = shutil.copytree(exports / "of-gathered" / "run", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"licence": "gemma", "terms": "https://x.org", "notice": "X is under terms"}
    config["model"]["accept_terms"] = True
    write_text(run / "config.yaml", json.dumps(config))
    summary = export_run(run, ExportConfig("gathered"), tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert summary["bytes"] < size < summary["bytes"] + 20_000  # the rest is the header
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"generation_config.json", GATHERS}
    tokenizers = AutoTokenizer.from_pretrained(tmp_path / "out"), ByT5Tokenizer(extra_ids=0)
    assert len({tuple(tokenizer("abc").input_ids) for tokenizer in tokenizers}) == 1
    said = "X is under terms. The weights of local were changed: they were pruned to 2:4."
    assert (tmp_path / "out" / "NOTICE").read_text() == f"{said}\n"
    _, head, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "gemma"
    assert f"{said} The terms: https://x.org" in card
    assert permllm.__version__ in card
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("form", ["folded", "gathered"])
def test_the_command_takes_the_first_form_that_the_run_allows(
    form: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(exports / f"of-{form}" / "run")
    assert call("export", [run, "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert f"({form}, bfloat16, " in capsys.readouterr().out
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_bad_requests(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = shutil.copytree(exports / "of-gathered" / "run", tmp_path / "run"), tmp_path / "out"
    assert call("export", [str(run), "--to", str(out), "--dtype", "int8"]) == 1
    with pytest.raises(ConfigError, match="export=gathered"):
        export_run(run, ExportConfig("folded"), out)
    with pytest.raises(DataError, match=r"folded/metrics\.json"):
        export_run(exports / "folded", ExportConfig(), out)
    with pytest.raises(ConfigError, match=str(run)):
        export_run(run, ExportConfig(), run)
    out.mkdir()
    monkeypatch.chdir(out)
    with pytest.raises(ConfigError, match=str(out)):
        export_run(run, ExportConfig(), out)
    change_metrics(run, status="running")
    with pytest.raises(ConfigError, match=str(run)):
        export_run(run, ExportConfig(), tmp_path / "other")
    assert not list(out.iterdir())


def test_a_run_of_the_hub_that_still_loads_its_model_is_not_finished(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"status": "running"})
    write_text(tmp_path / "config.yaml", "model: {source: hub, name: qwen2.5-7b}")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        export_run(tmp_path, ExportConfig(), tmp_path / "out")


def test_of_two_exports_to_one_folder_the_first_gets_it(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", "permllm", "export", str(exports / "of-folded" / "run")]
    words += ["--to", str(tmp_path / "out")]
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # once for both threads, each of which does so too
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda _: run_python(*words), range(2)))
    (second,) = [one for one in done if one.returncode]
    assert "not empty" in second.stderr
    assert present_export(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_export_is_present_where_it_is_whole(exports: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exports / "gathered", tmp_path / "out")
    for file in (GATHERS, SUMMARY):
        (out / file).write_text("[]")
        assert present_export(out) is None
    assert present_export(tmp_path / "nothing") is None
