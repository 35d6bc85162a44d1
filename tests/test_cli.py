"""The real command line: one job, a sweep, an export, and what bad input gets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import run_command, run_module

TINY = ("model=tiny", "logger=none")
FOLDABLE = "permutation.constraint=foldable"


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
    assert names == expected | {"environment.json", "evaluations", "run.log"}
    assert list((tmp_path / "runs").iterdir()) == [directory]  # the default logger, without a key
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}  # nothing else lies about
    written = (directory / "metrics.json").read_text()
    second = run_command("model=tiny", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "is finished already" in second.stderr
    assert (directory / "metrics.json").read_text() == written
    assert "Traceback" not in first.stderr + second.stderr


def test_a_sweep_runs_each_value_ends_with_one_table_and_survives_a_failing_job(tmp_path: Path) -> None:
    result = run_command("-m", *TINY, "block_size=16,30,32", cwd=tmp_path)
    assert result.returncode == 1
    assert "error: block_size=30 is not a multiple of M = 4" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2
    for words in ("sparse models", "block_size=16", "block_size=32", "2 ran, 1 failed"):
        assert words in result.stdout
    again = run_command("-m", *TINY, "block_size=16,30,32", cwd=tmp_path)
    assert "2 skipped, 1 failed" in again.stdout
    assert "is not a multiple of M" in again.stdout[again.stdout.index("jobs") :]


def test_directories_are_those_that_are_named(tmp_path: Path) -> None:
    quick = [*TINY, "permutation=none"]
    for name in ("run_dir", "hydra.run.dir"):
        assert run_command(*quick, f"{name}={name}", cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / name / "metrics.json").read_text())["status"] == "finished"
    other = run_command(*quick, "run_dir=run_dir", "seed=1", cwd=tmp_path)
    assert other.returncode == 1
    assert "run_dir/config.yaml is of another run (it differs in seed); choose another run_dir" in other.stderr
    several = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=many", cwd=tmp_path)
    assert several.returncode == 0, several.stderr
    assert len(list((tmp_path / "many").glob("tiny-wanda-none-2x4-*/metrics.json"))) == 2
    named = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=named", "hydra.sweep.subdir=${hydra:job.num}", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert "2 ran" in named.stdout
    assert sorted(path.parent.name for path in (tmp_path / "named").glob("*/metrics.json")) == ["0", "1"]
    assert not (tmp_path / "runs").exists()
    assert "builtin perplexity" in run_module("permllm", "results", str(tmp_path / "many")).stdout


def test_what_a_method_does_not_use_makes_no_second_run(tmp_path: Path) -> None:
    quick = [*TINY, "permutation=heuristic"]
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
    result = run_command("experiment=quickstart", *TINY, "budget.steps=12", "budget.text=12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("sparse models") :]
    for name in ("wanda", "wanda-cp", "order-paper", "permllm-wanda", "masks"):
        assert f"method={name} " in table


def test_a_run_exports_and_a_finished_one_exports_again_in_another_form(tmp_path: Path) -> None:
    arguments = [*TINY, "permutation=lcp-paper", "permutation.epochs=2", "pruner=sparsegpt", FOLDABLE]
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
    assert json.loads((directory / "metrics.json").read_text())["export"]["form"] == "gathered"


def test_a_free_order_from_a_file_is_gathered_and_not_folded(tmp_path: Path) -> None:
    assert run_command(*TINY, "permutation=heuristic", cwd=tmp_path).returncode == 0
    words = (*TINY, "permutation=from_file", f"permutation.path={only_run(tmp_path)}")
    folded = run_command(*words, "export=folded", cwd=tmp_path)
    assert folded.returncode == 1
    assert "does not fold" in folded.stderr
    gathered = run_command(*words, "export=gathered", cwd=tmp_path)
    assert gathered.returncode == 0, gathered.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=local"], "model.path"),
        (["permutation=heuristic", "export=folded"], FOLDABLE),
        (["block_size=16", "+model.architecture.head_dim=12", "sparsity=4:8", FOLDABLE], "which M = 8 does not divide"),
        ([FOLDABLE, "keep_dense=[o_proj,down_proj]", "permutation.last_layers=1"], "no order would learn: residual_stream"),
        (["model=qwen2.5-0.5b"], "model Qwen/Qwen2.5-0.5B is not whole in the local hub cache"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(words: list[str], message: str, tmp_path: Path) -> None:
    of_the_hub = words == ["model=qwen2.5-0.5b"]  # whose client reads HF_HOME where it is imported
    result = run_command(*TINY, *words, cwd=tmp_path, fresh=of_the_hub, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("masks.safetensors"))
