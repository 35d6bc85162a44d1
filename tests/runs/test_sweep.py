"""Sweeps: fixed folders, launchers, the search, and what becomes of each job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from permllm.job import Session, objective
from permllm.runs.outcomes import Outcome, kept
from permllm.runs.read import collect
from permllm.runs.sweep import _listed, sweep_name
from tests.conftest import ROOT, run_command

TINY = ("model=tiny", "logger=none")


def typed(*words: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["model=tiny"], return_hydra_config=True)
    config.hydra.overrides.task = list(words)
    config.hydra.runtime.choices.experiment = None
    return config


def outcomes(cwd: Path) -> list[tuple[str, str]]:
    """The last word that was typed for each job of the only sweep, and what became of it."""
    (folder,) = (cwd / "runs" / "sweeps").iterdir()
    return [(job.overrides[-1], job.outcome) for job in kept(folder)]


def environments(cwd: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (cwd / "runs").glob("*/environment.json")]


def test_a_sweep_is_named_by_what_was_typed() -> None:
    name = sweep_name(typed("block_size=32,64", "seed=1"))
    assert name.startswith("sweep-")
    assert sweep_name(typed("seed=1", "block_size=32,64", "force=true", "logger=none")) == name
    assert sweep_name(typed("block_size=32,64", "seed=2")) != name
    config = typed("experiment=table6")
    config.hydra.runtime.choices.experiment = "table6"
    assert sweep_name(config).startswith("table6-")


def test_a_glob_names_the_options_that_there_are(tmp_path: Path) -> None:
    result = run_command("-m", *TINY, "pruner=glob([m*,w*])", "permutation=none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert {job.outcome for job in kept(folder)} == {"ran"}
    assert {word for job in kept(folder) for word in job.overrides} >= {"pruner=magnitude", "pruner=wanda"}
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["submitit.core.utils", "joblib.externals.loky.process_executor", "somewhere"])
def test_a_launcher_whose_process_is_gone_ends_in_a_line_and_the_table(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = type("Gone", (Exception,), {"__module__": module})
    closed: list[bool] = []
    session = Session()
    monkeypatch.setattr(session, "close", lambda: closed.append(True) or 0)

    def launch() -> None:
        raise error("job 7 was killed\nfor its memory\n")

    if module == "somewhere":  # an error of ours is seen whole
        with pytest.raises(error):
            session.of(launch)
        return
    assert session.of(launch) == 1
    assert closed == [True]
    said = "error: Gone: job 7 was killed\nfor its memory\nthe same command continues where it stopped\n"
    assert capsys.readouterr().err == said


def test_outcomes_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "0000.json").write_text('{"overrides": ["a=1"], "outcome": "ran"}')
    (tmp_path / "jobs" / "0001.json").write_text('{"overrides": [')
    assert kept(tmp_path) == [Outcome(["a=1"], "ran")]


def test_outcomes_tell_the_way_from_the_sweeps_folder_and_how_old_they_are(tmp_path: Path) -> None:
    (tmp_path / "runs" / "sweeps" / "a" / "jobs").mkdir(parents=True)
    file = tmp_path / "runs" / "sweeps" / "a" / "jobs" / "0000.json"
    file.write_text('{"overrides": [], "outcome": "ran", "directory": "../../run"}')
    (job,) = kept(tmp_path / "runs" / "sweeps" / "a")
    assert job.directory == str(tmp_path / "runs" / "run")
    os.utime(file, (1000, 1000))
    assert kept(tmp_path / "runs" / "sweeps" / "a", since=1001) == []
    assert len(kept(tmp_path / "runs" / "sweeps" / "a", since=999)) == 1


def test_a_plan_keeps_what_is_known_of_a_sweep_and_a_run_in_use_is_skipped(tmp_path: Path) -> None:
    command = ["-m", *TINY, "permutation=none", "seed=0,1"]
    assert run_command(*command, cwd=tmp_path).returncode == 0
    planned = run_command(*command, "plan=true", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert [outcome for _, outcome in outcomes(tmp_path)] == ["ran", "ran"]
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    earlier = folder / "jobs" / "0007.json"  # of a version of the sweep that had it
    earlier.write_text('{"overrides": ["model=tiny", "permutation=lcp", "seed=0"], "outcome": "ran"}')
    assert "permutation=lcp" not in run_command(*command, "plan=true", cwd=tmp_path).stderr
    assert earlier.is_file()
    busy = Path(kept(folder)[0].directory or "")
    (lock,) = busy.glob(".lock-*")
    with FileLock(lock):
        again = run_command(*command, "force=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "1 ran, 1 skipped" in again.stdout
    assert "is in use by another process" in again.stdout
    assert "model=tiny permutation=lcp seed=0 is no job of this sweep any more" in again.stderr
    assert [file.name for file in sorted((folder / "jobs").iterdir())] == ["0000.json", "0001.json"]


def test_jobs_in_parallel_share_the_cores_and_their_outcomes_are_gathered(tmp_path: Path) -> None:
    command = ["-m", *TINY, "permutation=none", "pruner=magnitude,wanda,ria", "sparsity=2:4,2:5"]
    first = run_command(*command, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", cwd=tmp_path)
    assert first.returncode == 1
    # 5 divides no number of channels.
    assert "3 ran, 3 failed" in first.stdout
    assert "does not divide" in " ".join(first.stdout.split())
    assert outcomes(tmp_path) == [(r"sparsity=2\:4", "ran"), (r"sparsity=2\:5", "failed")] * 3
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {environment["hardware"]["threads"] for environment in environments(tmp_path)} == {share}
    # The dense model was evaluated once, by whichever job came first.
    assert len(list((tmp_path / "cache" / "dense").glob("*.json"))) == 1
    again = run_command(*command, cwd=tmp_path)  # of the same sweep, whatever launches it
    assert again.returncode == 1
    assert "3 skipped, 3 failed" in again.stdout
    assert outcomes(tmp_path) == [(r"sparsity=2\:4", "skipped"), (r"sparsity=2\:5", "failed")] * 3
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert not collect([tmp_path / "runs"]).skipped
    found = [job for job in kept(folder) if job.outcome == "skipped"]
    assert all((Path(str(job.directory)) / "metrics.json").is_file() for job in found)


def test_submitit_runs_jobs_through_its_local_executor(tmp_path: Path) -> None:
    command = ["-m", *TINY, "permutation=none", "hydra/launcher=submitit_local", "seed=0,1"]
    result = run_command(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 ran" in result.stdout
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert (folder / ".submitit").is_dir()


def test_the_search_repeats_itself_and_outlives_a_failing_trial(tmp_path: Path) -> None:
    command = ["-m", "hydra/sweeper=optuna", *TINY, "permutation.epochs=1", "hydra.sweeper.n_trials=4"]
    command += ["hydra.sweeper.direction=minimize", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0"]
    command += ["permutation.margin=tag(log, interval(0.01, 0.5))", "temperature.start=interval(0.1, 3.0)"]
    # 30 is no block size for 2:4: such trials fail.
    command.append("block_size=choice(16,30)")
    first = run_command(*command, cwd=tmp_path)
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    before = [job.overrides for job in kept(folder)]
    found = [job.outcome for job in kept(folder)]
    assert set(found) == {"ran", "failed"}
    assert first.returncode == 1
    assert "Traceback" not in first.stderr
    names = {word.split("=")[0] for words in before for word in words}
    assert {"permutation.margin", "temperature.start"} <= names
    best = (folder / "optimization_results.yaml").read_text()
    finished = [tmp_path / job.directory / "metrics.json" for job in kept(folder) if job.directory]
    assert f"best_value: {min(objective(json.loads(file.read_text())) for file in finished)}" in best
    again = run_command(*command, cwd=tmp_path)
    assert [job.overrides for job in kept(folder)] == before
    assert {job.outcome for job in kept(folder)} == {"skipped", "failed"}
    assert again.returncode == 1


def test_what_a_search_minimises() -> None:
    accuracy = {"zero_shot": {"sparse": {"rte": {"acc": 0.5, "n": 8}, "group": {"acc": 0.9, "n": None}}}}
    assert objective(accuracy) == pytest.approx(0.5)
    assert objective(accuracy | {"perplexity": {"sparse": {"wikitext2": {"value": 7.0}}}}) == 7.0
    several = {"a": {"value": 2.0}, "b": {"value": 8.0}}
    assert objective({"perplexity": {"sparse": several}}) == pytest.approx(4.0)
    assert objective({}) == float("inf")


def test_a_sweep_over_models_on_different_texts_is_refused_until_a_protocol_is_given(tmp_path: Path) -> None:
    command = ("-m", "model=tiny,smollm2-135m", "permutation=none", "pruner=magnitude", "logger=none", "plan=true")
    refused = run_command(*command, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: the models of this sweep have texts of their own")
    assert "model=tiny builtin and builtin; model=smollm2-135m boolq-passages and boolq-passages" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    for texts in (["protocol=offline"], ["calibration=builtin", "evaluation=builtin"]):
        assert run_command(*command, *texts, cwd=tmp_path).returncode == 0


def test_a_sweep_of_more_than_ten_jobs_says_which_before_it_starts(tmp_path: Path) -> None:
    # No job gets far: M must divide the channels.
    command = ("-m", "model=tiny", "logger=none", "permutation=none", "sparsity=3:7")
    said = run_command(*command, "seed=range(11)", cwd=tmp_path).stderr.splitlines()
    assert said[:3] == ["11 jobs:", "  seed=0", "  seed=1"]
    few = run_command(*command, "seed=range(2)", cwd=tmp_path)
    assert "jobs:" not in few.stderr
    axes = {"pruner": ["pruner=wanda", "pruner=ria"], "model": ["model=tiny"], "seed": [f"seed={n}" for n in range(12)]}
    listed = list(_listed(axes))
    assert listed[:2] == ["24 jobs:", "  pruner=wanda seed=0"]
    assert listed[20:] == ["  pruner=ria seed=7", "  and 4 more"]
