"""The real command line: one job, a sweep, the plan, and what bad input gets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import run_command, run_module


def only_run(cwd: Path) -> Path:
    (directory,) = [path for path in (cwd / "runs").iterdir() if (path / "metrics.json").is_file()]
    return directory


def test_one_job_leaves_a_record_and_the_second_time_skips(tmp_path: Path) -> None:
    first = run_command("model=tiny", cwd=tmp_path, fresh=True, NETRC=os.devnull)
    assert first.returncode == 0, first.stderr
    directory = only_run(tmp_path)
    assert str(directory.relative_to(tmp_path)) in first.stdout
    assert "builtin perplexity" in first.stdout
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    expected = {"config.yaml", "metrics.json", "history.jsonl", "permutations.safetensors", "masks.safetensors"}
    assert names == expected | {"environment.json", "scores.json", "run.log"}
    assert list((tmp_path / "runs").iterdir()) == [directory]  # the default logger, without a key
    written = (directory / "metrics.json").stat().st_mtime_ns
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}  # nothing else lies about
    second = run_command("model=tiny", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "is finished already" in second.stderr
    assert (directory / "metrics.json").stat().st_mtime_ns == written
    assert "Traceback" not in first.stderr + second.stderr


def test_a_sweep_runs_each_value_ends_with_one_table_and_survives_a_failing_job(tmp_path: Path) -> None:
    result = run_command("-m", "model=tiny", "logger=none", "block_size=16,30,32", cwd=tmp_path)
    assert result.returncode == 1
    assert "error: block_size=30 is not a multiple of M = 4" in result.stderr
    assert "Traceback" not in result.stderr
    metrics = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/metrics.json")]
    assert len(metrics) == 2
    assert all(entry["status"] == "finished" for entry in metrics)
    assert "sparse models" in result.stdout
    for label in ("block_size=16", "block_size=32"):
        assert label in result.stdout
    assert "2 ran, 1 failed" in result.stdout
    again = run_command("-m", "model=tiny", "logger=none", "block_size=16,30,32", cwd=tmp_path)
    assert "2 skipped, 1 failed" in again.stdout
    assert "is not a multiple of M" in again.stdout[again.stdout.index("jobs") :]


def test_hydras_directories_are_those_of_the_record(tmp_path: Path) -> None:
    quick = ["model=tiny", "logger=none", "permutation=none"]
    assert run_command(*quick, "hydra.run.dir=one/run", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "one" / "run" / "metrics.json").read_text())["status"] == "finished"
    several = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=many", cwd=tmp_path)
    assert several.returncode == 0, several.stderr
    assert len(list((tmp_path / "many").glob("tiny-wanda-none-2x4-*/metrics.json"))) == 2
    named = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=named", "hydra.sweep.subdir=${hydra:job.num}", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert sorted(path.parent.name for path in (tmp_path / "named").glob("*/metrics.json")) == ["0", "1"]
    assert not (tmp_path / "runs").exists()
    table = run_module("permllm", "results", str(tmp_path / "many"))
    assert "builtin perplexity" in table.stdout


def test_what_a_method_does_not_use_makes_no_second_run(tmp_path: Path) -> None:
    quick = ["model=tiny", "logger=none", "permutation=heuristic"]
    result = run_command("-m", *quick, "block_size=16,32", "temperature=linear,cosine", cwd=tmp_path)
    assert "1 ran, 3 skipped" in result.stdout
    again = run_command(*quick, "evaluation.perplexity.seqlen=32", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "(window 32)" in again.stdout
    assert "is finished already" not in again.stderr
    only_run(tmp_path)
    table = run_module("permllm", "results", str(tmp_path / "runs"))
    for window in (32, 64):
        assert f"builtin perplexity (window {window})" in table.stdout


def test_quickstart_compares_five_ways_in_one_table(tmp_path: Path) -> None:
    small = ("budget.steps=12", "budget.text=12")
    result = run_command("experiment=quickstart", "model=tiny", *small, "logger=none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("sparse models") :]
    assert "builtin perplexity" in table
    for name in ("wanda", "wanda-cp", "order-paper", "permllm-wanda", "masks"):
        assert f"method={name} " in table
    for name in ("dense", "none", "heuristic", "lcp", "lcp-paper", "score"):
        assert name in table


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=local"], "model.path"),
        (["model=qwen2.5-0.5b", "logger=none"], "model Qwen/Qwen2.5-0.5B is not whole in the local hub cache"),
    ],
)
def test_bad_input_ends_with_code_1_and_no_traceback(overrides: list[str], message: str, tmp_path: Path) -> None:
    of_the_hub = message.startswith("model Qwen")  # whose client reads HF_HOME where it is imported
    result = run_command(*overrides, cwd=tmp_path, fresh=of_the_hub, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_another_directory_of_the_cache_and_a_run_directory_by_name(tmp_path: Path) -> None:
    arguments = ["model=tiny", "logger=none", "permutation=none", f"run_dir={tmp_path / 'mine'}"]
    assert run_command(*arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "mine" / "metrics.json").is_file()
    other = run_command(*arguments, "seed=1", cwd=tmp_path)
    assert other.returncode == 1
    assert "holds another config (it differs in seed)" in other.stderr


def test_a_run_exports_and_a_finished_one_exports_again_in_another_form(tmp_path: Path) -> None:
    arguments = ["model=tiny", "logger=none", "permutation.constraint=foldable"]
    first = run_command(*arguments, "export=folded", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    directory = only_run(tmp_path)
    verified = run_module("permllm", "verify", str(directory / "export"))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    written = (directory / "export" / "model.safetensors").stat().st_mtime_ns
    again = run_command(*arguments, "export=folded", cwd=tmp_path)
    assert "export is there already" in again.stderr
    assert (directory / "export" / "model.safetensors").stat().st_mtime_ns == written
    gathered = run_command(*arguments, "export=gathered", cwd=tmp_path)
    assert gathered.returncode == 0, gathered.stderr
    assert only_run(tmp_path) == directory  # the export is no part of what makes a result
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["export"]["form"] == "gathered"


def test_free_orders_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    for permutation in ("lcp", "heuristic"):
        result = run_command("model=tiny", f"permutation={permutation}", "export=folded", cwd=tmp_path)
        assert result.returncode == 1
        assert "permutation.constraint=foldable" in result.stderr
    assert not (tmp_path / "runs").exists()
    free = run_command("model=tiny", "logger=none", "permutation=heuristic", cwd=tmp_path)
    assert free.returncode == 0
    source = f"permutation.path={only_run(tmp_path)}"
    result = run_command("model=tiny", "logger=none", "permutation=from_file", source, "export=folded", cwd=tmp_path)
    assert result.returncode == 1
    assert "does not fold" in result.stderr
    kept = run_command("model=tiny", "logger=none", "permutation=from_file", source, "export=gathered", cwd=tmp_path)
    assert kept.returncode == 0, kept.stderr


@pytest.mark.parametrize("permutation", ["none", "heuristic", "lcp-paper"])
def test_every_foldable_method_folds(permutation: str, tmp_path: Path) -> None:
    extra = [] if permutation == "none" else ["permutation.constraint=foldable"]
    extra += ["permutation.epochs=2"] if permutation == "lcp-paper" else []
    arguments = ["model=tiny", "logger=none", f"permutation={permutation}", "pruner=sparsegpt", "export=folded", *extra]
    result = run_command(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run_module("permllm", "verify", str(only_run(tmp_path) / "export")).returncode == 0


@pytest.mark.parametrize("stages", ["permutation.layers_per_stage=1", "permutation.last_layers=1"])
def test_an_order_that_could_not_learn_is_refused(stages: str, tmp_path: Path) -> None:
    words = ("model=tiny", "logger=none", "permutation.constraint=foldable", "keep_dense=[o_proj,down_proj]", stages)
    refused = run_command(*words, cwd=tmp_path)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: no order would learn: residual_stream learns only in a stage that holds all layers")
    assert not list(tmp_path.rglob("metrics.json"))


def test_m_must_divide_the_heads_of_a_foldable_order_and_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    heads = ["+model.architecture.head_dim=12", "sparsity=4:8", "permutation.constraint=foldable"]
    result = run_command("model=tiny", "logger=none", "block_size=16", *heads, cwd=tmp_path)
    assert result.returncode == 1
    assert "have 12 channels, which M = 8 does not divide" in result.stderr
    assert not (tmp_path / "runs").exists()
