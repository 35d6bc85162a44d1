"""Exported checkpoints, ours and as other tools write them: what `verify` must not pass, and what must never load.

Every case is made from an export that is whole; files are written anew, without our checksums,
unless the case is about these.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from permllm.cli import call
from permllm.errors import ConfigError, DataError, PermLLMError
from permllm.export import bench
from permllm.export.card import model_card
from permllm.export.checkpoint import SUMMARY, Request, export_run, present_export
from permllm.export.verify import verify
from tests.export.test_checkpoint import logits, make_run, variant_model

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, dict[str, Any]], object]

UP, NORM, HEAD = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
ORDER = "model.layers.0.self_attn.o_proj.input_order"
GATHERED = ORDER.removesuffix(".input_order")
NAN, INFINITE = float("nan"), float("inf")


def put(name: str, value: float, place: int = -1) -> Change:
    """One number of a tensor is another."""
    return lambda tensors, config: tensors[name].view(-1)[place : place + 1 or None].fill_(value)


def become(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """A tensor is another."""
    return lambda tensors, config: tensors.update({name: change(tensors[name])})


def gone(*names: str) -> Change:
    """Tensors are missing."""
    return lambda tensors, config: [tensors.pop(name) for name in names]


def settings(**values: Any) -> Change:
    """The config says something else."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config.get("dense_config", config).update(values)

    return change


# What is done to an export, and what is said about it.
PLAIN: dict[str, tuple[Change, str]] = {
    "a linear is missing": (gone(UP), f"lacks {UP}"),
    "the head is missing": (gone(HEAD), f"lacks {HEAD}"),
    "another shape": (become(UP, lambda weight: weight[:60]), f"another shape .* {UP}"),
    "a stranger": (
        lambda tensors, config: tensors.update({"x.weight": torch.zeros(2, 4)}),
        "asks for none, x.weight",
    ),
    "whole numbers": (become(UP, lambda weight: weight.to(torch.int8)), f"{UP} .*I8"),
    "NaN in a linear": (put(UP, NAN, 0), f"{UP} holds values that are not finite"),
    "infinite head": (put(HEAD, INFINITE), f"{HEAD} holds values that are not finite"),
    "fewer layers in the config": (settings(num_hidden_layers=1), r"model\.layers\.1\."),
    "an unknown quantisation": (
        settings(quantization_config={"quant_method": "nope"}),
        "quantization_config",
    ),
    "settings that make NaN": (settings(rms_norm_eps=-1e30), "logits"),
}
ORDERS: dict[str, tuple[Change, str]] = {
    "an order is missing": (gone(ORDER), f"lacks {ORDER}"),
    "an order names a channel twice": (put(ORDER, 0), f"{ORDER} is no permutation"),
    "an order is too short": (become(ORDER, lambda order: order[:-1]), f"another shape .* {ORDER}"),
    "an order of fractions": (become(ORDER, lambda order: order.float()), f"{ORDER} .*F32"),
    "one gather less": (
        lambda tensors, config: config["dense_config"]["gathers"].remove(GATHERED),
        f"asks for none, {ORDER}",
    ),
    "a gather twice": (
        lambda tensors, config: config["dense_config"]["gathers"].append(GATHERED),
        f"names {GATHERED} twice",
    ),
    "a gather of nothing": (
        lambda tensors, config: config["dense_config"]["gathers"].append("x"),
        "x is no module",
    ),
    "gathers that are no list": (settings(gathers="x"), "input can be gathered"),
}
CASES = [
    *[("folded", name, *case) for name, case in PLAIN.items()],
    *[("gathered", name, *case) for name, case in {**PLAIN, **ORDERS}.items()],
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole export in each form, and the runs that they are from."""
    folder = tmp_path_factory.mktemp("exports")
    for form, constraint in (("folded", "foldable"), ("gathered", "free")):
        run = make_run(folder / f"of-{form}", variant_model("llama"), constraint)
        export_run(run, Request(form), folder / form)
    return folder


def rewritten(source: Path, folder: Path, change: Change, summary: bool = False) -> Path:
    """An export with something changed, written by another tool; `permllm.json` stays beside it where that is asked for."""
    shutil.copytree(source, folder)
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    if not summary:
        (folder / SUMMARY).unlink()
    return folder


def verdict(folder: Path) -> str:
    """What `verify` says is wrong, in whichever way; nothing where it passes."""
    try:
        report = verify(folder, against=folder)
    except (ConfigError, DataError) as error:
        return str(error)
    assert report.passed == (not report.problems)
    return "\n".join(report.problems)


@pytest.mark.parametrize("kind", ["folded", "gathered"])
def test_whole_exports_pass_with_and_without_checksums(
    kind: str, exports: Path, tmp_path: Path
) -> None:
    ours, theirs = (
        verify(exports / kind),
        verify(rewritten(exports / kind, tmp_path / "x", lambda *_: None)),
    )
    assert (ours.passed, ours.checksums, ours.problems) == (True, True, [])
    assert (theirs.passed, theirs.checksums, theirs.problems) == (True, False, [])


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    CASES,
    ids=[f"{kind}: {name}" for kind, name, *_ in CASES],
)
def test_what_is_not_whole_neither_passes_nor_loads(
    kind: str, name: str, change: Change, message: str, exports: Path, tmp_path: Path
) -> None:
    folder = rewritten(exports / kind, tmp_path / "x", change)
    assert re.search(message, verdict(folder))
    with pytest.raises(PermLLMError, match=message) as refused:
        bench.load(folder, torch.device("cpu"), None)
    assert "\n" not in str(refused.value)
    if (
        kind != "folded" and name != "settings that make NaN"
    ):  # a model of ours, which loads nowhere
        with pytest.raises(PermLLMError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


def test_whole_models_load_in_every_way(exports: Path) -> None:
    folder = exports / "gathered"
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(logits(model), expected)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")), expected
    )
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.get_submodule(GATHERED).input_order.dtype == torch.int32


def test_what_the_hub_has_is_compared_too(exports: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    snapshot.parent.mkdir()
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    shutil.copytree(exports / "gathered", snapshot)
    expected = logits(AutoModelForCausalLM.from_pretrained(exports / "gathered"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("some/model", **hub)), expected)
    shutil.rmtree(snapshot)
    rewritten(exports / "gathered", snapshot, gone(ORDER))
    with pytest.raises(DataError, match=f"lacks {ORDER}"):
        AutoModelForCausalLM.from_pretrained("some/model", **hub)


def test_a_flipped_bit_of_ours_is_found_by_its_sha256(exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "gathered", tmp_path / "x")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"model\.safetensors is not what was written"):
        verify(folder)


def test_a_checkpoint_without_a_config_proves_nothing(exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "folded", tmp_path / "x")
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in verdict(folder)


def test_the_command_says_what_is_wrong_and_how_contents_were_compared(
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def command(folder: Path) -> tuple[int, str]:
        return call("verify", [str(folder)]), capsys.readouterr().out

    code, said = command(exports / "folded")
    assert (code, "contents compared with their sha256" in said, said.splitlines()[-1]) == (
        0,
        True,
        "passed",
    )
    code, said = command(rewritten(exports / "folded", tmp_path / "theirs", lambda *_: None))
    assert (code, "contents not compared" in said, said.splitlines()[-1]) == (0, True, "passed")
    assert call("verify", [str(tmp_path / "theirs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checksums"] is False

    def strangers(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors.update({f"x\npassed\x1b[2K.{number}": torch.zeros(1) for number in range(30)})

    code, said = command(rewritten(exports / "folded", tmp_path / "strange", strangers))
    assert code == 1
    assert "- it has, although its config asks for none, x\\npassed\\x1b[2K.0" in said
    assert "passed" not in said.splitlines()
    assert said.splitlines()[-1] == "- and 10 more"
    assert call("verify", [str(tmp_path / "strange"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], len(report["problems"])) == (False, 30)


CONTENTS = ["", "[]", "{", "{}", '{"weight_map": {"x": 1}}', "[" * 9999]


@pytest.mark.parametrize(
    "file", ["config.json", SUMMARY, "model.safetensors.index.json", "generation_config.json"]
)
def test_garbage_in_a_json_file_is_one_line(file: str, exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "folded", tmp_path / "x")
    if file.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
    for content in CONTENTS:
        (folder / file).write_text(content)
        valid = (
            file == "generation_config.json" and content.startswith("{") and content.endswith("}")
        )
        refused = pytest.raises(DataError, match=f"^[^\n]*{re.escape(file)}[^\n]*$")
        with nullcontext() if valid else refused:
            verify(folder)
        # permllm.json says what is on sparse tensor cores, where there are some.
        with nullcontext() if valid or file == SUMMARY else refused:
            bench.load(folder, torch.device("cpu"), None)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.safetensors"])
def test_an_index_names_files_of_its_own_folder_alone(
    name: str, exports: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exports / "folded", tmp_path / "a" / "x")
    (folder / "model.safetensors").rename(tmp_path / "a" / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: name}}))
    for read in (verify, lambda path: bench.load(path, torch.device("cpu"), None)):
        with pytest.raises(DataError, match=r"weight_map|which its index names"):
            read(folder)


def test_two_files_with_one_tensor_are_refused(exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "folded", tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")
    index = {"weight_map": {UP: "a.safetensors", NORM: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="both hold"):
        verify(folder)


def test_a_difference_that_is_not_finite_fails(exports: Path, tmp_path: Path) -> None:
    folder = rewritten(
        exports / "folded", tmp_path / "x", put(HEAD, 3e38)
    )  # in float64 it would not overflow
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert verify(folder).passed
    assert "difference of its logits" in verdict(folder)


def test_a_dense_model_that_is_not_whole_is_not_exported(exports: Path, tmp_path: Path) -> None:
    run = shutil.copytree(exports / "of-folded" / "run", tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    changes = (
        (gone(UP), f"lacks {UP}"),
        (become(UP, lambda weight: weight[:8]), f"another shape .* {UP}"),
        (put(NORM, NAN), f"{NORM} holds values that are not finite"),
    )
    for number, (change, message) in enumerate(changes):
        dense = tmp_path / str(number)
        dense.mkdir()
        tensors = load_file(exports / "of-folded" / "dense" / "model.safetensors")
        change(tensors, {})
        save_file(tensors, dense / "model.safetensors", {"format": "pt"})
        shutil.copyfile(exports / "of-folded" / "dense" / "config.json", dense / "config.json")
        (run / "metrics.json").write_text(json.dumps(metrics | {"model": "a hub's"}))
        with pytest.raises(DataError, match=message):
            export_run(run, Request("folded"), tmp_path / "out", dense)
        assert not list(tmp_path.glob("*out*"))


def test_an_export_is_present_where_it_is_whole(exports: Path, tmp_path: Path) -> None:
    summary = present_export(exports / "gathered")
    assert summary is not None
    assert (summary["form"], summary["gathers"]) == ("gathered", 6)
    assert present_export(tmp_path / "nothing") is None
    for number, break_it in enumerate(
        (
            lambda folder: (folder / SUMMARY).unlink(),
            lambda folder: (folder / SUMMARY).write_text("[]"),
            lambda folder: os.truncate(folder / "model.safetensors", 5000),
        )
    ):
        folder = shutil.copytree(exports / "gathered", tmp_path / str(number))
        break_it(folder)
        assert present_export(folder) is None


def test_a_model_card_holds_names_and_no_markup_of_theirs() -> None:
    name = "a|b](http://x) <script>alert(1)</script> `c` # d\n---\nlicense: mit\n# e"
    config = {
        "model": {"name": name, "hub_name": f"{name}: [x]", "source": "hub"},
        "pruner": {"name": "*p*"},
        "permutation": {"name": "x"},
        "reconstruction": {"name": "none"},
        "seed": 0,
    }
    values = {"value": 1.0, "window": 2, "tokens": 3}
    perplexity = {"dense": {name: values}, "sparse": {name: values}}
    metrics = {"name": "run`s", "config_hash": "0", "perplexity": perplexity}
    summary = {"sparsity": "2:4", "form": "folded", "gathers": 0, "dtype": "float32", "bytes": 1}
    environment = {"command": "run.py `x` ``y``\n# z", "versions": {"torch": "<b>"}}
    card = model_card(config, metrics, environment, summary)
    _, head, body = card.split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "base_model", "tags"}
    assert "- command: ``` run.py `x` ``y`` # z ```" in body.splitlines()
    for markup in ("<script", "](http", "`c`", "*p*", "<b>"):
        assert markup not in body.replace("\\<", "").replace("\\]", "").replace("\\`", "").replace(
            "\\*", ""
        )
    assert len([line for line in body.splitlines() if line.startswith("#")]) == 1
