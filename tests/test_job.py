"""The run record: its schema, resuming, forcing, and rebuilding the pruned model."""

from __future__ import annotations

import errno
import json
import logging
import re
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from permllm import job
from permllm.data.texts import TEXTS
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import measure_perplexity, perplexity_windows
from permllm.export.apply import apply_record
from permllm.export.verify import verify
from permllm.models.checkpoint import read_weights
from permllm.models.families import channel_groups, linear_at
from permllm.models.load import load_model, meta_model
from permllm.pruning.methods import checked_groups, methods_of
from permllm.report.metrics import flat_metrics
from permllm.runtime import precision
from permllm.runtime.signals import CONTINUES, Terminated
from permllm.settings.config import read_config
from permllm.sparsity.nm import violations
from permllm.store.files import read_json, read_lines
from permllm.store.tensors import load_masks
from tests.conftest import tiny_model
from tests.settings.test_config import composed

BUILTIN = TEXTS["builtin"]
TENSORS = ("permutations.safetensors", "masks.safetensors")


def run(tmp_path: Path, *overrides: str) -> tuple[dict[str, Any], Path]:
    words = ("model=tiny-random", "logger=none", f"runs_dir={tmp_path}/runs", *overrides)
    result = job.run(read_config(composed(*words)))
    assert result is not None
    return result.metrics, result.directory


def test_data_that_the_hub_does_not_give_end_a_job_before_the_model_is_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("data.texts.hub_file", "evaluation.lm_eval.task_manager"):
        monkeypatch.setattr(f"permllm.{place}", Mock(side_effect=DataError("no network")))
    monkeypatch.setattr(job, "load_model", None)
    tasks = "evaluation.tasks=[hellaswag] evaluation.lm_eval.source=hub"
    for words in ("evaluation.perplexity.dataset=[builtin,wikitext2]", "calibration=c4", tasks):
        with pytest.raises(DataError, match="no network"):
            run(tmp_path, *words.split())


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return metrics and directory of a run that learns an order."""
    return run(tmp_path_factory.mktemp("learned"))


@pytest.mark.parametrize(
    ("pruner", "permutation"),
    [("magnitude", "none"), ("ria", "heuristic"), ("sparsegpt", "lcp")],
)
def test_the_record_has_the_documented_schema_and_rebuilds_the_model(
    cache: Path, tmp_path: Path, pruner: str, permutation: str
) -> None:
    metrics, directory = run(tmp_path, f"pruner={pruner}", f"permutation={permutation}")
    assert read_json(directory / "metrics.json") == metrics
    assert metrics["schema_version"] == 3
    for which in ("dense", "sparse"):
        assert set(metrics["perplexity"][which]["builtin"]) == {"value", "window", "tokens"}
    assert metrics["sparsity"]["pattern"] == "2:4"
    assert metrics["sparsity"]["fraction"] == 0.5
    assert metrics["sparsity"]["violations"] == 0
    assert metrics["peak_memory_bytes"] > 0
    assert metrics["planned_memory_bytes"] > 0
    phases = {"load", "evaluate dense", "calibrate", "permute", "prune", "evaluate sparse"}
    assert phases <= set(metrics["seconds"])
    assert (directory / "weights").is_dir() == (pruner == "sparsegpt")

    config = read_config(composed("model=tiny-random"))
    loaded = load_model(config.model, config.seed)
    model = loaded.model
    apply_record(model, loaded.identity, directory)
    orders = load_file(directory / "permutations.safetensors")
    masks = load_masks(directory / "masks.safetensors")
    for group in channel_groups(model):
        assert orders[group.name].dtype == torch.int64
        assert metrics["retained_saliency"][group.name] <= 1
        assert metrics["output_error"][group.name] > 0
        for path in group.members:
            weight = linear_at(model, path).weight
            assert violations(weight, orders[group.name], config.pattern) == 0
            assert not weight[~masks[path]].any()
    windows = perplexity_windows(loaded, BUILTIN, config.evaluation.perplexity, "builtin")
    expected = metrics["perplexity"]["sparse"]["builtin"]["value"]
    assert measure_perplexity(model, windows, 2048)["value"] == pytest.approx(expected, rel=1e-6)


def test_history_has_a_line_a_pass(learned: tuple[dict[str, Any], Path]) -> None:
    directory = learned[1]
    lines = read_lines(directory / "history.jsonl")
    epochs = yaml.safe_load((directory / "config.yaml").read_text())["permutation"]["epochs"]
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    figures = {"loss", "measured_loss", "temperature", "flips", "step_seconds", "peak_memory_bytes"}
    assert set(lines[0]) == figures | {"group", "epoch", "first_layer", "last_layer"}
    environment = read_json(directory / "environment.json")
    assert {"versions", "git", "hardware", "seed", "command", "started"} == set(environment)


def test_a_finished_run_is_skipped_and_force_gives_the_same_bits_again(
    learned: tuple[dict[str, Any], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, directory = learned
    before = [(directory / name).read_bytes() for name in TENSORS]
    calls: list[str] = []
    real = job.load_model
    monkeypatch.setattr(job, "load_model", lambda *args: calls.append("load") or real(*args))
    run(directory.parents[1])
    assert not calls
    again, _ = run(directory.parents[1], "force=true")
    assert calls == ["load"]
    assert again["perplexity"] == first["perplexity"]
    assert [(directory / name).read_bytes() for name in TENSORS] == before


def test_the_learned_order_serves_another_pruner(
    learned: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, file = learned[1], tmp_path / "int32.safetensors"
    expected = load_file(directory / TENSORS[0])
    save_file({name: order.int() for name, order in expected.items()}, file)
    _, other = run(
        tmp_path, "pruner=sparsegpt", "permutation=from_file", f"permutation.path={file}"
    )
    orders = load_file(other / TENSORS[0])
    assert all(orders[name].dtype == torch.int64 for name in expected)
    assert all(torch.equal(orders[name], expected[name]) for name in expected)
    narrow = ("model.architecture.hidden_size=16", "model.architecture.num_attention_heads=2")
    with pytest.raises(ConfigError, match=r"permutation\.path"):
        run(tmp_path, "permutation=from_file", f"permutation.path={directory}", *narrow)
    del expected["model.layers.1.self_attn.qkv_proj"]
    save_file(expected, file)
    monkeypatch.setattr(job, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"\.1\.self_attn\.qkv"):
        run(tmp_path, "permutation=from_file", f"permutation.path={file}")


def test_weights_that_were_not_kept_cannot_be_rebuilt(cache: Path, tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "pruner=sparsegpt", "permutation=none", "save_weights=false")
    config = read_config(composed("model=tiny-random"))
    with pytest.raises(DataError, match="save_weights=false"):
        apply_record(load_model(config.model, 0).model, metrics["model"], directory)
    with pytest.raises(DataError, match="was pruned from random:"):
        apply_record(load_model(config.model, 1).model, "another", directory)


def test_your_own_text(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(BUILTIN.evaluation())
    (tmp_path / "held-out.txt").write_text(BUILTIN.evaluation().upper())
    settings = ["calibration=text", f"calibration.data_files={tmp_path}/mine.txt"]
    settings += ["calibration.samples=4", "calibration.seqlen=32", "permutation=none"]
    held_out = f"evaluation.perplexity.data_files={tmp_path}/held-out.txt"
    metrics, _ = run(tmp_path, *settings, held_out)
    assert set(metrics["perplexity"]["sparse"]) == {"held-out"}
    before = read_config(composed("model=tiny-random", *settings)).hash
    (tmp_path / "copy.txt").write_text(BUILTIN.evaluation())
    for name in ("mine", "copy"):
        with pytest.raises(ConfigError, match=f"evaluation.*{name}.txt"):
            run(tmp_path, *settings, f"evaluation.perplexity.data_files={tmp_path}/{name}.txt")
    # Another content is another run.
    (tmp_path / "mine.txt").write_text(BUILTIN.evaluation().upper())
    assert read_config(composed("model=tiny-random", *settings)).hash != before


@pytest.mark.parametrize(
    ("group", "words"),
    [("permutation", ["permutation=lcp"]), ("mask", ["permutation=none", "mask=score"])],
)
def test_last_layers_that_all_stay_dense_are_refused(group: str, words: list[str]) -> None:
    words = [*words, f"{group}.last_layers=1", "keep_dense=[-1]"]
    config = read_config(composed("model=tiny-random", *words))
    with pytest.raises(ConfigError, match=f"{group}.last_layers=1"):
        checked_groups(config, methods_of(config), meta_model(config.model))


def test_an_export_is_made_again_where_it_is_another_one_and_stays_where_that_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("permutation=none", "export=simulate")
    _, directory = run(tmp_path, *words)
    (whole,) = (directory / "export").glob("*.safetensors")
    made, before = whole.stat().st_mtime_ns, whole.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(job, "export_run", Mock(side_effect=DataError("no space left")))
        run(tmp_path, *words)
        with pytest.raises(DataError, match="no space left"):
            run(tmp_path, "permutation=none", "export=gathered")
    assert (whole.stat().st_mtime_ns, whole.read_bytes()) == (made, before)
    run(tmp_path, *words, "export.shard_gb=0.0001")
    assert len(list((directory / "export").glob("*.safetensors"))) > 1
    metrics, _ = run(tmp_path, "permutation=none", "export=gathered")
    assert metrics["export"]["form"] == "gathered"


def test_no_space_leaves_nothing_that_looks_like_a_result(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        if (tmp_path / "runs") in file.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("permllm.store.tensors.save_file", full)
    with pytest.raises(DataError, match="No space left"):
        run(tmp_path, "permutation=none")
    (directory,) = (tmp_path / "runs").glob("[!.]*")
    assert not list(directory.glob("*.safetensors"))
    assert json.loads((directory / "metrics.json").read_text())["status"] == "running"


def test_no_file_beside_a_finished_run_makes_it_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permllm.job.gap_of", Mock(side_effect=PermissionError("of a stranger")))
    small = ["permutation=none", "calibration.samples=2", "calibration.seqlen=32"]
    metrics, _ = run(tmp_path, *small, "logger=tensorboard")
    assert metrics["status"] == "finished"


def test_the_log_says_what_the_job_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = ["permutation=none", "calibration.samples=2", "calibration.seqlen=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permllm.job.prune_layers", Mock(side_effect=Terminated(signal.SIGTERM)))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *small)
    _, directory = run(tmp_path, *small)
    lines = [line.split(" ", 3) for line in (directory / "run.log").read_text().splitlines()]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert all(re.fullmatch(stamp, f"{day} {time}") for day, time, *_ in lines)
    said = [rest for *_, rest in lines]
    assert sum(line.startswith("command: ") for line in said) == 2
    assert f"ended: interrupted by SIGTERM: {CONTINUES}" in said
    assert said[-1] == "finished"
    assert any(line.startswith("prune: ") for line in said)
    before = (directory / "run.log").read_bytes()
    run(tmp_path, *small)  # is finished, and nothing happens
    assert (directory / "run.log").read_bytes() == before


def test_parts_of_a_model_stay_dense(cache: Path, tmp_path: Path) -> None:
    words = ["permutation.epochs=1", "mask=score", "mask.layers_per_stage=1", "mask.epochs=1"]
    words = ["permutation.constraint=foldable", "keep_dense=[0,v_proj]", *words]
    metrics, directory = run(tmp_path, *words, "export=folded")
    names = ["mlp.gate", "mlp.up", "mlp.down", *(f"self_attn.{letter}" for letter in "qkvo")]
    dense = [*(f"model.layers.0.{name}_proj" for name in names), "model.layers.1.self_attn.v_proj"]
    assert metrics["sparsity"]["patterns"] == dict.fromkeys(dense, "dense")
    assert metrics["sparsity"]["violations"] == 0
    # Pruned are 32 x (32 + 16 + 32) weights of attention and 3 x 32 x 64 of the MLP.
    assert metrics["sparsity"]["of_model"] == (2560 + 6144) / 2 / (2 * (3072 + 6144))
    assert len(load_masks(directory / "masks.safetensors")) == 6
    report = verify(directory / "export")
    assert report["passed"], report["problems"]
    assert report["dense"] == sorted(f"{path}.weight" for path in dense)
    card = (directory / "export" / "README.md").read_text()
    assert "2:4, 8 dense, 23.61% zeros" in card
    assert not any("patterns" in name for name in flat_metrics(metrics))  # a curve for each linear
    # What was pruned is rebuilt from the record, to be evaluated in another way.
    again, _ = run(tmp_path, *words, "evaluation.perplexity.limit=1")
    assert again["sparsity"] == metrics["sparsity"]


@pytest.mark.parametrize(
    "words",
    [
        ("model.placement=device", "reconstruction=distill", "reconstruction.epochs=1"),
        ("model.placement=disk", "pruner=sparsegpt"),
    ],
)
def test_a_model_in_a_dtype_that_is_slow_here_is_computed_in_float32_and_written_in_its_own(
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    tiny_model("llama").save_pretrained(tmp_path / "model")  # in float32
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    common = ["model=local", f"model.path={tmp_path}/model", "model.dtype=bfloat16"]
    common += ["calibration=builtin", "calibration.samples=4", "calibration.seqlen=32"]
    common += ["evaluation=builtin", "permutation=none", "export=simulate"]
    with caplog.at_level(logging.INFO):
        metrics, directory = run(tmp_path, *common, *words)
    assert caplog.text.count("computed in float32, because this CPU is slow in bfloat16") == 1
    assert metrics["model"].endswith(":bfloat16")
    assert metrics["compute_dtype"] == "float32"
    for file in (*directory.glob("weights/*"), directory / "export" / "model.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
    # What was measured is what was written.
    config = read_config(composed(*common))
    loaded = load_model(config.model, config.seed)
    windows = perplexity_windows(loaded, BUILTIN, config.evaluation.perplexity, "builtin")
    found = {"dense": loaded.model.float()}
    found["sparse"] = read_weights(directory / "export", torch.float32, torch.device("cpu"))
    for which, model in found.items():
        value = metrics["perplexity"][which]["builtin"]["value"]
        assert measure_perplexity(model, windows, 2048)["value"] == pytest.approx(value, rel=1e-6)
