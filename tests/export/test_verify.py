"""The check of checkpoints: ours in every form, foreign ones, and what is wrong in bad ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import permllm
from permllm.cli import call
from permllm.errors import ConfigError, DataError, PermLLMError
from permllm.export.gathered import GATHERS
from permllm.export.verify import logits_difference, verify
from permllm.export.write import export_run
from permllm.runtime.files import file_sha256
from permllm.settings.config import ExportConfig, NMPattern
from permllm.store.files import SUMMARY
from tests.export.pruned import change_metrics, load, make_run, take_as_pruned, variant_model
from tests.models.test_bad_checkpoints import HEAD, NORM, UP, WEIGHTS, poisoned, rewrite

ORDER = "model.layers.0.self_attn.o_proj.input_order"
GATHERED = ORDER.removesuffix(".input_order")


def test_the_command_says_its_verdict(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, list[str]]:
        return call("verify", list(words)), capsys.readouterr().out.splitlines()

    for form in ("folded", "gathered"):
        code, said = command(str(exports / form))
        assert (code, said[0].split()[0]) == (0, "passed:")
        assert "14 weights, 50.00% zeros, 0 violations" in said[1]
        assert said[-1] == "files compared with their sha256"
    code, said = command(str(exports / "simulate"), "--pattern", "2:4")
    assert (code, said[0].split()[0]) == (1, "FAILED:")
    against = ["--against", str(exports / "simulate"), "--json"]
    code, said = command(str(exports / "folded"), *against)
    report = json.loads("\n".join(said))
    assert (code, report["passed"], report["checksums"], report["problems"]) == (0, True, True, [])
    assert report["difference"]["relative"] < 1e-5
    assert abs(report["difference"]["kl"]) < 1e-8
    assert report["difference"]["agreement"] == 1.0
    assert report["bytes"] == (exports / "folded" / WEIGHTS).stat().st_size
    code, said = command(str(exports / "nowhere"), "--json")
    assert code == 2
    assert "nowhere" in json.loads("\n".join(said))["error"]


def test_the_original_order_fails_with_counted_violations(exports: Path) -> None:
    report = verify(exports / "simulate", NMPattern(2, 4))
    state = load_file(exports / "simulate" / WEIGHTS)
    for layer in report["layers"]:
        groups = (state[layer["name"]] != 0).view(-1, 4)
        assert layer["violations"] == sum(int(sum(group) > 2) for group in groups.tolist())
    assert len(report["problems"]) == sum(layer["violations"] > 0 for layer in report["layers"]) > 0
    assert not report["passed"]


def test_the_original_order_passes_by_the_zeros_of_its_rows(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exports / "simulate", tmp_path / "out")
    assert call("verify", [str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("passed:")
    assert "simulate" in said[1]
    assert len(said) == 4
    weight = load_file(folder / WEIGHTS)[UP]
    zero = int((weight[3] == 0).nonzero()[0])
    weight[3, zero] = 1.0
    rewrite(folder, {UP: weight})
    summary = json.loads((folder / SUMMARY).read_text())
    summary["sha256"][WEIGHTS] = file_sha256(folder / WEIGHTS)
    (folder / SUMMARY).write_text(json.dumps(summary))
    report = verify(folder)
    assert (report["passed"], report["by_row"]) == (False, True)
    assert [problem.split()[:3] for problem in report["problems"]] == [[UP, "has", "1"]]


def test_another_tools_checkpoint_of_a_family_without_a_table(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("gpt_neox", **sizes, num_attention_heads=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.gpt_neox.layers.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            parameter.data.view(-1, 4)[:, 2:] = 0.0
    model.save_pretrained(tmp_path / "good")
    report = verify(tmp_path / "good")
    assert (report["passed"], report["checksums"], len(report["layers"])) == (True, False, 4)
    with pytest.raises(ConfigError, match="2:6"):
        verify(tmp_path / "good", NMPattern(2, 6))
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    model.get_parameter(name).data[0, :4] = torch.tensor([1.0, 2.0, 3.0, -0.0])
    model.save_pretrained(tmp_path / "bad")
    report = verify(tmp_path / "bad")
    assert [problem.split()[0] for problem in report["problems"]] == [name]
    (layer,) = [layer for layer in report["layers"] if layer["name"] == name]
    assert layer["violations"] == 1


# What is changed of an export: tensors of a file, settings of the config; and what is said of it.
PERMUTED = UP.replace("weight", "permuted_weight")
INTEGERS = torch.ones(64, 32, dtype=torch.int8)
FEW = torch.arange(31, dtype=torch.int32)
BAD: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "a linear is missing": ("folded", WEIGHTS, {UP: None}, {}, UP),
    "a gathered linear is missing": ("gathered", WEIGHTS, {PERMUTED: None}, {}, UP),
    "a linear of integers": ("gathered", WEIGHTS, {PERMUTED: INTEGERS}, {}, PERMUTED),
    "a stranger": ("gathered", WEIGHTS, {"x.weight": torch.zeros(2, 4)}, {}, "x.weight"),
    "an infinite head": ("folded", WEIGHTS, {HEAD: poisoned((259, 32), torch.inf)}, {}, HEAD),
    "settings that make NaN": ("folded", WEIGHTS, {}, {"rms_norm_eps": -1e30}, "logits"),
    "an order is missing": ("gathered", GATHERS, {ORDER: None}, {}, GATHERED),
    "an order names a channel twice": ("gathered", GATHERS, {ORDER: FEW.new_zeros(32)}, {}, ORDER),
    "an order is too short": ("gathered", GATHERS, {ORDER: FEW}, {}, GATHERED),
    "an order of fractions": ("gathered", GATHERS, {ORDER: torch.arange(32.0)}, {}, ORDER),
    "another gather": ("gathered", GATHERS, {}, {"gathers": ["x"]}, GATHERS),
    "gathers of nothing": ("gathered", GATHERS, {}, {"gathers": None}, GATHERS),
    "no config": ("gathered", GATHERS, {}, {"dense_config": {"dense_type": "x"}}, "x"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_whole_is_one_line(name: str, exports: Path, tmp_path: Path) -> None:
    form, file, tensors, settings, named = BAD[name]
    folder = shutil.copytree(exports / form, tmp_path / "bad")
    rewrite(folder, tensors, file, **settings)
    (folder / SUMMARY).unlink()  # as a tool that states no sha256
    reads: list[Callable[[Path], object]] = [verify]
    if name != "settings that make NaN":  # which only a forward shows
        reads.append(permllm.load)
    for read in reads:
        with pytest.raises(PermLLMError, match=re.escape(named)) as refused:
            read(folder)
        assert "\n" not in str(refused.value)
        assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        (SUMMARY, "{", SUMMARY),
        (SUMMARY, '{"sparsity": "2:4", "sha256": {"model.safetensors": "0"}}', "sha256"),
        (SUMMARY, None, "sparsity='4:2'"),
        ("config.json", "[]", "config.json"),
        (GATHERS, "garbage", GATHERS),
    ],
)
def test_garbage_is_one_line(
    file: str, content: str | None, named: str, exports: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exports / "gathered", tmp_path / "bad")
    if content is None:
        content = (folder / file).read_text().replace('"2:4"', '"4:2"')
    elif file != SUMMARY:
        (folder / SUMMARY).unlink()
    (folder / file).write_text(content)
    with pytest.raises(PermLLMError, match=f"^[^\n]*{re.escape(named)}[^\n]*$"):
        verify(folder)


def test_a_checkpoint_that_says_something_else_of_its_linears_fails(tmp_path: Path) -> None:
    keep_dense = ("0", "down_proj")
    run = make_run(tmp_path, variant_model("llama"), "foldable", keep_dense=keep_dense)
    summary = export_run(run, ExportConfig("folded"), tmp_path / "out")
    assert len(verify(tmp_path / "out")["dense"]) == 8
    assert not verify(tmp_path / "out", NMPattern(2, 4))["passed"]  # which is of every linear
    kept = {path: text for path, text in summary["patterns"].items() if "1.mlp" not in path}
    (tmp_path / "out" / SUMMARY).write_text(json.dumps(summary | {"patterns": kept}))
    assert "down_proj.weight" in verify(tmp_path / "out")["problems"][0]
    (tmp_path / "out" / SUMMARY).write_text(json.dumps(summary | {"patterns": {"x": "2:4"}}))
    with pytest.raises(DataError, match=r"patterns.* x,"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({UP: None}, UP),
        ({NORM: poisoned((32,), torch.nan)}, f"{NORM} holds"),
        ({UP: poisoned((64, 32), 1e30)}, f"{UP} holds values that are not finite in torch.float16"),
        (None, "was pruned from"),
    ],
    ids=["missing", "not finite", "does not fit", "another model"],
)
def test_a_dense_model_that_is_not_whole_is_not_exported(
    changed: dict[str, Any] | None, named: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, variant_model("llama"), "foldable")
    if changed is None:
        change_metrics(run, model="local:other:float32")
    else:
        rewrite(tmp_path / "dense", changed)
        take_as_pruned(run, tmp_path / "dense")
    with pytest.raises(DataError, match=re.escape(named)):
        export_run(run, ExportConfig("folded", "float16"), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_difference_of_logits_is_that_of_the_formulas(exports: Path) -> None:
    first, second = exports / "simulate", exports / "of-simulate" / "dense"
    inputs = torch.randint(259, (4, 64), generator=torch.Generator().manual_seed(0))
    a, b = (
        load(folder, dtype=torch.float32)(input_ids=inputs).logits for folder in (first, second)
    )
    a, b = a.detach().double(), b.detach().double()
    divergence = b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))
    expected = {
        "largest": float((a - b).abs().max()),
        "relative": float((a - b).norm() / b.norm()),
        "kl": float(divergence.sum(-1).mean()),
        "agreement": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }
    assert logits_difference(first, second) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["agreement"] < 1
