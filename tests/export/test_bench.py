"""The benchmark of checkpoints: what it measures, not how fast it is; CUDA's part where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from permllm.cli import call
from permllm.config import NMPattern
from permllm.errors import DataError
from permllm.export.bench import (
    sparse_tensor_cores,
    use_sparse_tensor_cores,
    why_dense,
    without_gathers,
)
from permllm.export.checkpoint import Request, export_run
from permllm.export.verify import Stated
from permllm.models.families import channel_groups, linear_at
from tests.conftest import run_module, tiny_model
from tests.export.test_checkpoint import logits, make_run, variant_model

CUDA = torch.device("cuda")


def test_the_command_line_measures_all_that_a_cpu_can(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "free")
    export_run(run, Request("gathered"), tmp_path / "out")
    small = [
        "--prompt",
        "8",
        "--new-tokens",
        "2",
        "--batch-sizes",
        "1",
        "2",
        "--repeats",
        "1",
        "--layer-tokens",
        "16",
    ]
    words = [str(tmp_path / "out"), "--against", str(tmp_path / "dense"), *small, "--device", "cpu"]
    result = run_module("permllm", "bench", *words, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "no sparse tensor cores here" in report["note"]
    variants = ["dense", "as stored", "as stored, gathers left out"]
    assert [(row["variant"], row["batch"]) for row in report["speed"]] == [
        (name, b) for b in (1, 2) for name in variants
    ]
    assert all(
        row["prefill_tokens_a_second"] > 0 and row["decode_tokens_a_second"] > 0
        for row in report["speed"]
    )
    assert report["gathers"] == 6
    assert (
        report["file_bytes"]["as stored"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    )
    assert [row["channels"] for row in report["layers"]] == [32, 32, 32, 64]
    assert report["layers"][0]["sparse_s"] is None


def test_what_is_not_multiplied_by_sparse_tensor_cores_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two, four = NMPattern(2, 4), NMPattern(4, 8)
    assert "no sparse tensor cores here" in why_dense(torch.device("cpu"), {two}, torch.bfloat16)
    monkeypatch.setattr("permllm.export.bench.sparse_tensor_cores", lambda device: True)
    assert why_dense(CUDA, {two, None}, torch.bfloat16) == ""
    assert "multiply 2:4 alone" in why_dense(CUDA, {four}, torch.bfloat16)
    assert "this is float32 (--dtype bfloat16)" in why_dense(CUDA, {two}, torch.float32)


@pytest.mark.parametrize("option", ["--prompt", "--batch-sizes"])
def test_nothing_cannot_be_measured(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bench", [str(tmp_path), option, "0"]) == 1
    assert capsys.readouterr().err == f"error: {option}=0: expected a whole number of at least 1\n"


def test_gathers_can_be_left_out_for_a_while(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "free")
    export_run(run, Request("gathered"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    before = logits(model)
    with without_gathers(model):
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not sparse_tensor_cores(CUDA),
    reason="needs sparse tensor cores",
)
def test_sparse_tensor_cores_compute_the_same(tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    run = make_run(tmp_path, variant_model("llama", **shape), "foldable")
    export_run(run, Request("folded", dtype="float16"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(CUDA).eval()
    x = torch.randn(64, 128, device=CUDA, dtype=torch.float16)
    linear = linear_at(model, channel_groups(model)[0].members[0])
    before = linear(x)
    assert (
        use_sparse_tensor_cores(
            model, Stated(NMPattern(2, 4), {"model.layers.0.mlp.down_proj": "dense"})
        )
        == 13
    )
    torch.testing.assert_close(linear(x), before, rtol=1e-2, atol=1e-2)


def test_a_dense_weight_gets_no_sparse_kernel() -> None:
    with pytest.raises(DataError, match=r"layers\.0.*is not 2:4 in stored order"):
        use_sparse_tensor_cores(variant_model("llama"), Stated(NMPattern(2, 4)))


def test_a_prompt_longer_than_a_sliding_window_is_measured(tmp_path: Path) -> None:
    tiny_model("gemma3_text").save_pretrained(tmp_path / "sliding")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "sliding")
    small = [
        "--prompt",
        "12",
        "--new-tokens",
        "2",
        "--batch-sizes",
        "1",
        "--repeats",
        "2",
        "--layer-tokens",
        "16",
    ]
    result = run_module(
        "permllm", "bench", str(tmp_path / "sliding"), *small, "--device", "cpu", "--json"
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["speed"]
    assert row["decode_tokens_a_second"] > 0
