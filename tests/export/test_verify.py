"""Proving checkpoints: ours in every form, foreign ones, and broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from permllm import job
from permllm.cli import call
from permllm.config import NMPattern, read_config
from permllm.errors import ConfigError, DataError
from permllm.export.checkpoint import Request, export_run
from permllm.export.verify import verify
from tests.conftest import run_module
from tests.export.test_checkpoint import make_run, variant_model
from tests.test_config import composed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, variant_model("llama"), "foldable")


@pytest.mark.parametrize("form", ["folded", "gathered"])
def test_exports_that_are_sparse_in_stored_order_pass(form: str, run: Path, tmp_path: Path) -> None:
    export_run(run, Request(form), tmp_path / "out")
    report = verify(tmp_path / "out", against=tmp_path / "dense")
    assert report.passed
    assert len(report.layers) == 14
    assert all(layer.zeros == 0.5 for layer in report.layers)
    assert report.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.difference is not None
    assert report.difference["relative"] > 0.1  # pruning a random model is not subtle


def test_the_difference_from_the_unfolded_model_is_rounding(run: Path, tmp_path: Path) -> None:
    export_run(run, Request("folded"), tmp_path / "out")
    export_run(run, Request("simulate"), tmp_path / "plain")
    found = verify(tmp_path / "out", against=tmp_path / "plain").difference
    assert found is not None
    assert found["relative"] < 1e-5
    assert abs(found["kl"]) < 1e-8
    assert found["agreement"] == 1.0


def test_the_original_order_fails_with_counted_violations(run: Path, tmp_path: Path) -> None:
    export_run(run, Request("simulate"), tmp_path / "out")
    report = verify(tmp_path / "out")
    assert not report.passed
    state = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report.layers:
        groups = (state[layer.name] != 0).view(-1, 4)
        assert layer.violations == sum(int(sum(group) > 2) for group in groups.tolist())
    assert sum(layer.violations or 0 for layer in report.layers) > 0


def test_other_patterns_are_read_from_our_exports_and_can_be_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "foldable", NMPattern(4, 8))
    export_run(run, Request("folded"), tmp_path / "out")
    assert verify(tmp_path / "out").pattern == "4:8"
    assert verify(tmp_path / "out").passed
    assert not verify(tmp_path / "out", NMPattern(2, 4)).passed


def foreign(folder: Path, tensors: dict[str, Tensor], config: PreTrainedConfig) -> Path:
    """A checkpoint as another tool writes it: without checksums, and without anything of ours beside it."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(folder)
    return folder


def test_another_tools_checkpoints_of_families_that_we_do_not_know(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **sizes))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.endswith("weight") and tensor.dim() == 2 and not name.startswith("embed"):
            tensor[:, 2:] = 0.0
    report = verify(foreign(tmp_path / "good", tensors, model.config))
    assert report.passed
    assert not report.checksums
    assert len(report.layers) == 4
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    tensors[name] = torch.tensor(
        [[1.0, 2, 0, -0.0], [0, float("nan"), 3, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    )
    report = verify(foreign(tmp_path / "bad", tensors, model.config))
    (layer,) = [layer for layer in report.layers if layer.name == name]
    assert (layer.violations, layer.negative_zeros, layer.nan) == (1, 1, 1)
    assert [problem.removeprefix(f"{name} ") for problem in report.problems] == [
        "holds values that are not finite",
        "has 1 groups of 4 with more than 2 nonzeros",
        "holds 1 zeros as -0.0",
    ]
    assert verify(tmp_path / "good", NMPattern(2, 6)).layers[0].violations is None
    assert not verify(tmp_path / "good", NMPattern(2, 6)).passed


def test_what_cannot_be_read(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        verify(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no safetensors files"):
        verify(tmp_path / "empty")
    export_run(run, Request("folded", shard_gb=2e-5), tmp_path / "out")
    second = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"lacks {second.name}"):
        verify(tmp_path / "out")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"123")
    with pytest.raises(DataError, match="broken"):
        verify(tmp_path / "broken")


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = run_module(
        "permllm", "export", str(run), "--form", "folded", "--dtype", "bfloat16", "--to", str(out)
    )
    assert exported.returncode == 0, exported.stderr
    assert "(folded, bfloat16)" in exported.stdout
    passed = run_module("permllm", "verify", str(out), "--against", str(tmp_path / "dense"))
    assert passed.returncode == 0, passed.stderr
    assert "passed" in passed.stdout
    failed = run_module("permllm", "verify", str(tmp_path / "dense"))
    assert (failed.returncode, "FAILED" in failed.stdout) == (1, True)


def test_stock_transformers_finds_the_perplexity_of_the_run(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "model=tiny",
        "permutation=heuristic",
        "permutation.constraint=foldable",
        "export=folded",
        "logger=none",
    )
    small = ("calibration.samples=4", "calibration.seqlen=16", "evaluation.perplexity.limit=3")
    assert job.run(read_config(composed(*words, *small, f"run_dir={tmp_path}/run"))) is not None
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "export"
    assert call("verify", [str(checkpoint), "--stock", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stock"]
    assert found["class"].endswith(".LlamaForCausalLM")
    assert found["perplexity_stock"] == pytest.approx(found["perplexity_of_the_run"], rel=1e-5)
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    other.lm_head.weight.data.mul_(1.5)  # which changes no pattern
    other.save_pretrained(tmp_path / "other")
    for file in checkpoint.glob("tokenizer*"):
        copyfile(file, tmp_path / "other" / file.name)
    assert (
        call("verify", [str(tmp_path / "other"), "--stock", str(tmp_path / "run"), "--json"]) == 1
    )
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert report["problems"] == [
        f"stock transformers finds another perplexity than the run {report['stock']['run']}"
    ]


def test_linears_of_an_unknown_family_are_told_by_their_class(tmp_path: Path) -> None:
    """Not its head, and none whose inputs are the rows."""
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **config)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(DataError, match=r"GPT2LMHeadModel stores weights as \(C_in, C_out\)"):
        verify(tmp_path / "gpt2")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
        "intermediate_size": 64,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes)).save_pretrained(
        tmp_path / "rwkv"
    )
    names = [layer.name for layer in verify(tmp_path / "rwkv").layers]
    assert len(names) == 2 * 7
    assert not any("head" in name or "embed" in name for name in names)
