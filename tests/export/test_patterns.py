"""Exports of models that are pruned in part, to several patterns: they compute the same, and are proven linear by linear."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from permllm.config import NMPattern
from permllm.export.checkpoint import Request, export_run
from permllm.export.verify import verify
from permllm.runs.files import read_json, write_json
from tests.export.test_checkpoint import load, logits, make_run, reference, relative, variant_model

# A layer, a member of a group, and a group of the residual stream stay dense; a group has another
# M.
PARTS = {
    "llama-biases": (
        ("layers.1.mlp", "v_proj", "layers.0.mlp.gate_up_proj"),
        {"layers.0.mlp.down_proj": "4:8"},
    ),
    "qwen3-tied": (("0", "layers.1.self_attn.o_proj"), {"layers.1.mlp.gate_up_proj": "6:8"}),
    "opt-projected": (("-1", "q_proj"), {"fc2": "8:16"}),
    "llama": (
        ("qkv_proj", "gate_up_proj"),
        {"o_proj": "4:8"},
    ),  # nothing reads the residual stream permuted
}


@pytest.mark.parametrize("form", ["folded", "gathered"])
@pytest.mark.parametrize("name", sorted(PARTS))
def test_what_stays_dense_follows_the_orders_around_it(
    name: str, form: str, tmp_path: Path
) -> None:
    keep_dense, sparsity_of = PARTS[name]
    constraint = "foldable" if form == "folded" else "free"
    run = make_run(
        tmp_path, variant_model(name), constraint, keep_dense=keep_dense, sparsity_of=sparsity_of
    )
    export_run(run, Request(form), tmp_path / "out")
    expected = logits(reference(variant_model(name), run))
    assert relative(logits(load(tmp_path / "out")), expected) < 1e-5
    assert relative(logits(variant_model(name)), expected) > 0.01

    report = verify(tmp_path / "out")
    assert report.passed, report.problems
    told = read_json(run / "metrics.json")["sparsity"]["patterns"]
    assert report.dense == sorted(
        f"{path}.weight" for path, text in told.items() if text == "dense"
    )
    for layer in report.layers:
        assert layer.pattern == told.get(layer.name.removesuffix(".weight"), "2:4")
        pattern = NMPattern.parse(layer.pattern)
        assert layer.zeros == 1 - pattern.n / pattern.m
    state = load_file(tmp_path / "out" / "model.safetensors")  # by hand, from the file alone
    for layer in report.layers:
        pattern = NMPattern.parse(layer.pattern)
        assert int((state[layer.name] != 0).view(-1, pattern.m).sum(1).max()) == pattern.n
    assert all(bool((state[dense] != 0).all()) for dense in report.dense)


def test_a_checkpoint_that_says_something_else_of_its_linears_fails(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        variant_model("llama"),
        "foldable",
        keep_dense=("0",),
        sparsity_of={"down_proj": "4:8"},
    )
    export_run(run, Request("folded"), tmp_path / "out")
    assert not verify(tmp_path / "out", NMPattern(2, 4)).passed  # which is of every linear
    summary = read_json(tmp_path / "out" / "permllm.json")
    changed = {key: text for key, text in summary["patterns"].items() if text != "4:8"}
    write_json(tmp_path / "out" / "permllm.json", summary | {"patterns": changed})
    report = verify(tmp_path / "out")
    assert any(
        re.search("down_proj.weight has .* more than 2 nonzeros", found)
        for found in report.problems
    )
