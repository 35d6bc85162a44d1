"""Sweeps: folders, launchers, the search, and the outcome of each job."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from permllm import cli
from permllm.errors import SHORT_ERRORS, ConfigError
from permllm.report.metrics import objective
from permllm.report.read import collect
from permllm.settings.composition import SWEEP_VARIABLE
from permllm.store import sweep
from permllm.store.files import read_json
from permllm.store.sweep import Outcome, read_outcomes
from tests.conftest import ROOT, run_command

TINY = ("model=tiny-random", "logger=none")


def before_its_jobs(*words: str, given: tuple[str, ...] = (), **swept: str) -> str:
    """Do what Hydra asks for before the first job of a sweep, and return the sweep's name.

    Args:
        words: that were typed, as the jobs have them.
        given: those of them that compose the settings.
        swept: `hydra.sweeper.params`.
    """
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "config", overrides=["model=tiny-random", *given], return_hydra_config=True
        )
        config.hydra.overrides.task = list(words)
        names = [word[11:] for word in words if word.startswith("experiment=")]
        config.hydra.runtime.choices.experiment = names[0] if names else None
        config.hydra.sweeper.params = swept
        sweep.SweepFolder().on_multirun_start(config)
    return os.environ[SWEEP_VARIABLE]


@pytest.fixture
def _nothing_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (SWEEP_VARIABLE, sweep.FOLDER_VARIABLE):
        monkeypatch.setenv(variable, "none")


def outcomes(cwd: Path) -> list[tuple[str, str]]:
    """Return the last word that was typed for each job of the only sweep, and its outcome."""
    (folder,) = (cwd / "runs" / "sweeps").iterdir()
    return [(job.overrides[-1], job.outcome) for job in read_outcomes(folder)]


@pytest.mark.usefixtures("_nothing_started")
def test_a_sweep_is_named_by_its_jobs() -> None:
    name = before_its_jobs("block_size=32,64", "seed=1")
    assert name.startswith("sweep-")
    assert before_its_jobs("seed=1", "block_size=32,64", "force=true", "logger=none") == name
    assert before_its_jobs("block_size=32,64", "seed=2") != name
    table6 = [before_its_jobs("experiment=table6", block_size=one) for one in ("32", "32,64", "32")]
    assert table6[0].startswith("table6-")
    assert table6[0] == table6[2] != table6[1]


@pytest.mark.usefixtures("_nothing_started")
def test_a_sweep_that_cannot_be_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        before_its_jobs("seed=0,1", given=("runs_dir=a", "hydra.sweep.dir=b"))
    assert "error: runs_dir and hydra.sweep.dir" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["submitit.core.core", "joblib.externals.loky._base", "other"])
def test_a_launcher_whose_process_is_gone_ends_in_a_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def launch():\n    raise EOFError('job 7 was killed\\nfor its memory')"
    of_launcher: dict[str, Any] = {"__name__": module}
    exec(code, of_launcher)
    monkeypatch.setattr("hydra.main", lambda **_: lambda job: of_launcher["launch"])
    for variable in ("HYDRA_FULL_ERROR", SHORT_ERRORS):  # which the command sets
        monkeypatch.setenv(variable, "1")
    with suppress(EOFError):  # a defect is raised
        assert cli.run_command() == 1
    said = capsys.readouterr().err
    assert ("error: EOFError: job 7 was killed\nfor its memory\n" in said) == (module != "other")


def test_outcomes_move_with_their_folder_and_what_cannot_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = tmp_path / "old" / "sweeps" / "a" / "jobs"
    monkeypatch.setattr(sweep, "outcome_file", lambda: jobs / "0000.json")
    monkeypatch.setattr(sweep, "overrides", lambda: ["a=1"])
    sweep.write_outcome("ran", directory=tmp_path / "old" / "run")
    (jobs / "0001.json").write_text('{"overrides": [')
    (tmp_path / "old").rename(tmp_path / "new")
    found = read_outcomes(tmp_path / "new" / "sweeps" / "a")
    assert found == [Outcome(["a=1"], "ran", directory=str(tmp_path / "new" / "run"))]


def joblib(n_jobs: int) -> DictConfig:
    target = "hydra_plugins.hydra_joblib_launcher.JoblibLauncher"
    return OmegaConf.create({"_target_": target, "n_jobs": n_jobs})


def test_each_process_of_joblib_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("joblib.effective_n_jobs", lambda n_jobs: n_jobs % 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv(sweep.GPUS_VARIABLE, "")
    for n_jobs in (3, -1):
        with pytest.raises(ConfigError, match=rf"hydra\.launcher\.n_jobs={n_jobs}"):
            sweep.share_gpus(joblib(n_jobs), "auto")
    sweep.share_gpus(joblib(3), "cpu")
    assert sweep.GPUS_VARIABLE not in os.environ
    sweep.share_gpus(joblib(2), "auto")
    taken, held = [], []
    for _ in range(2):  # two processes
        sweep.take_gpu.cache_clear()
        for _ in range(2):  # two jobs of a process
            held.append(sweep.take_gpu())
            taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["5", "5", "7", "7"]
    sweep.take_gpu.cache_clear()
    # The first process ends and is replaced.
    monkeypatch.setattr("time.sleep", lambda _: held[0].release())
    sweep.take_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_a_place_is_named_once(tmp_path: Path) -> None:
    refused = run_command("run_dir=a", "hydra.run.dir=b", *TINY, cwd=tmp_path)
    (error,) = refused.stderr.splitlines()
    assert error.endswith("are the same setting: give one of them")
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.slow
def test_two_processes_that_start_a_sweep_share_it(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "run.py"), "-m", *TINY, "permutation.epochs=20"]
    variables = os.environ | {"PERMLLM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    options: Any = {"cwd": tmp_path, "env": variables, "stdout": PIPE, "stderr": PIPE, "text": True}
    for process in [subprocess.Popen([*words, "seed=0,1,2"], **options) for _ in range(2)]:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert "Traceback" not in error
        assert "failed" not in out
    logs = [file.read_text() for file in tmp_path.glob("runs/*/run.log")]
    assert [log.count("finished") for log in logs] == [1, 1, 1]
    assert {outcome for _, outcome in outcomes(tmp_path)} <= {"ran", "skipped"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_outcomes_of_jobs_are_gathered_and_read_outcomes(processes: int, tmp_path: Path) -> None:
    command = ["-m", *TINY, "permutation=none", "pruner=glob([m*,w*])", "sparsity=2:4,2:5"]
    joblib = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={processes}"]
    first = run_command(*command, *joblib[: 2 * (processes > 1)], cwd=tmp_path)
    assert "2 ran, 2 failed" in first.stdout
    assert "does not divide" in " ".join(first.stdout.split())  # M = 5
    assert outcomes(tmp_path) == [(r"sparsity=2\:4", "ran"), (r"sparsity=2\:5", "failed")] * 2
    if processes > 1:  # which share the cores
        share = max(1, len(os.sched_getaffinity(0)) // processes)
        environments = map(read_json, (tmp_path / "runs").glob("*/environment.json"))
        assert {environment["hardware"]["threads"] for environment in environments} == {share}
    # The same sweep, whatever launches it: a plan leaves its outcomes, a run in use is skipped.
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    before = read_outcomes(folder)
    run_command(*command, "plan=true", cwd=tmp_path)
    assert read_outcomes(folder) == before
    directory = Path(read_outcomes(folder)[0].directory or "")
    (lock,) = (directory.parent / ".locks").glob(f"{directory.name}-*.lock")
    with FileLock(lock):
        again = run_command(*command, "force=true", cwd=tmp_path)
    assert "1 ran, 1 skipped, 2 failed" in again.stdout
    assert "is in use by another process" in again.stdout
    assert collect([tmp_path / "runs"]).notes == []


@pytest.mark.slow
def test_submitit_runs_jobs_through_its_local_executor(tmp_path: Path) -> None:
    words = ("-m", *TINY, "permutation=none", "hydra/launcher=submitit_local", "seed=0,1")
    result = run_command(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 ran" in result.stdout


def test_the_search_repeats_itself_and_outlives_a_failing_trial(tmp_path: Path) -> None:
    sweeper = ("n_trials=4", "direction=minimize", "n_jobs=1", "sampler.seed=0")
    command = ["-m", "hydra/sweeper=optuna", *(f"hydra.sweeper.{word}" for word in sweeper)]
    # 30 is no block size for 2:4: such trials fail.
    command += [*TINY, "permutation.epochs=1", "block_size=choice(16,30)"]
    command += ["temperature.start=interval(0.1, 3.0)"]
    first = run_command(*command, cwd=tmp_path)
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    before = [job.overrides for job in read_outcomes(folder)]
    assert {job.outcome for job in read_outcomes(folder)} == {"ran", "failed"}
    assert "Traceback" not in first.stderr
    finished = [
        tmp_path / job.directory / "metrics.json" for job in read_outcomes(folder) if job.directory
    ]
    best = min(objective(read_json(file)) for file in finished)
    assert f"best_value: {best}" in (folder / "optimization_results.yaml").read_text()
    run_command(*command, cwd=tmp_path)
    assert [job.overrides for job in read_outcomes(folder)] == before
    assert {job.outcome for job in read_outcomes(folder)} == {"skipped", "failed"}


def test_a_search_minimises_the_perplexity_or_the_error() -> None:
    tasks = {
        "rte": {"metrics": {"acc,none": 0.5}, "n": 8},
        "group": {"metrics": {"acc,none": 0.9}, "n": None},
        "no": {"metrics": {"f1": 1.0}, "n": 8},
        "none": {"metrics": {"acc,none": None}, "n": 8},
        "first": {"metrics": {"acc,none": 0.1}, "n": 8, "asked": "two"},
        "second": {"metrics": {"acc,none": 0.3}, "n": 8, "asked": "two"},
    }
    found = {name: {"stderr": {}, "asked": name} | values for name, values in tasks.items()}
    metrics = {"tasks": {"sparse": found}}
    assert objective(metrics) == pytest.approx(1 - (0.5 + (0.1 + 0.3) / 2) / 2)
    several = {"a": {"value": 2.0}, "b": {"value": 8.0}}
    assert objective(metrics | {"perplexity": {"sparse": several}}) == pytest.approx(4.0)
    assert objective({}) == float("inf")
