"""W&B, MLflow and TensorBoard: names, groups, curves and final numbers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.errors import AuthenticationError

from permllm import job
from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.runs.files import LOGGED, WANDB_ID, read_json, read_lines
from permllm.runs.loggers import RunLogger, _WandB, described, open_logger
from permllm.runs.measures import flat_figures
from tests.conftest import run_command, run_module
from tests.test_config import composed


def records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a run, as wandb's own command prints them."""
    printed = run_module("wandb", "leet", "inspect", str(file), "--json")
    assert printed.returncode == 0, printed.stderr
    return [json.loads(line) for line in printed.stdout.splitlines()]


def rows(of_run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in of_run if "history" in record]


def header(of_run: list[dict[str, Any]]) -> dict[str, Any]:
    return next(dict(record["run"]) for record in of_run if "run" in record)


def offline_runs(directory: Path) -> list[list[dict[str, Any]]]:
    return [records(file) for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))]


def numbers_of(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        key: value for key, value in flat_figures(metrics).items() if isinstance(value, int | float)
    }


def test_a_sweep_is_a_group_of_runs_with_curves_and_final_numbers(tmp_path: Path) -> None:
    words = (
        "-m",
        "model=tiny",
        "block_size=16,32",
        "calibration.samples=4",
        "logger=wandb",
        "force=false",
    )
    result = run_command(*words, cwd=tmp_path, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert "wandb" not in result.stderr.lower()
    of_runs = {header(of_run)["display_name"]: of_run for of_run in offline_runs(tmp_path / "runs")}
    assert set(of_runs) == {
        f"model=tiny block_size={size} calibration.samples=4" for size in (16, 32)
    }
    (group,) = {header(of_run)["run_group"] for of_run in of_runs.values()}
    assert (tmp_path / "runs" / "sweeps" / group).is_dir()
    for of_run in of_runs.values():
        head = header(of_run)
        assert (head["project"], head["job_type"], head["tags"]) == (
            "permllm",
            "learn",
            ["wanda", "lcp", "2:4", "tiny"],
        )
        config = head["config"]["update"]
        directory = tmp_path / config["run_directory"]
        assert (directory / WANDB_ID).read_text().strip() == head["run_id"]
        metrics = read_json(directory / "metrics.json")
        assert config["config_hash"] == metrics["config_hash"]
        assert "logger" not in config

        steps = [row for row in rows(of_run) if "lcp/step" in row]
        assert [row["lcp/step"] for row in steps] == list(range(len(steps)))
        assert all(
            {f"lcp/{name}" for name in ("loss", "temperature", "flips", "seconds")} <= set(row)
            for row in steps
        )
        epochs = [row for row in rows(of_run) if "lcp/epoch" in row]
        assert [row["lcp/epoch"] for row in epochs] == [1, 2, 3]
        for row, entry in zip(epochs, read_lines(directory / "history.jsonl"), strict=True):
            measured = {key: value for key, value in entry.items() if value is not None}
            assert {
                key.removeprefix("epoch/"): row[key] for key in row if key.startswith("epoch/")
            } == measured
        places = [row["_step"] for row in rows(of_run)]
        assert places == sorted(set(places))
        (final,) = (
            update
            for one in of_run
            if "status" in (update := one.get("summary", {}).get("update", {}))
        )
        assert final.items() >= numbers_of(metrics).items()
        assert of_run[-1]["exit"].get("exit_code", 0) == 0


def test_figures_are_one_level_and_say_minutes_and_nats() -> None:
    perplexity = {"dense": {"a": {"value": 4.0}}, "sparse": {"a": {"value": 4.0}}}
    tasks = {
        "sparse": {"rte": {"metrics": {"acc,none": 0.5}, "stderr": {"acc,none": None}, "n": 8}}
    }
    metrics = {
        "perplexity": perplexity,
        "tasks": tasks,
        "evaluation": {"perplexity": {"seqlen": 64}},
        "sha256": {"x": "y"},
    }
    metrics |= {
        "retained_saliency": {"a": 0.5, "b": 0.7},
        "seconds": {"permute": 90.0, "load": 5.0},
    }
    metrics |= {"sparsity": {"pattern": "2:4", "patterns": {"a.b": "4:8"}}}
    assert flat_figures(metrics) == {
        "perplexity/dense/a/value": 4.0,
        "perplexity/sparse/a/value": 4.0,
        "tasks/sparse/rte/metrics/acc,none": 0.5,
        "tasks/sparse/rte/n": 8,
        "retained_saliency/mean": pytest.approx(0.6),
        "seconds/permute": 90.0,
        "seconds/load": 5.0,
        "sparsity/pattern": "2:4",
        "minutes": 1.5,
        "nats_above_dense": 0.0,
    }


def test_a_failed_job_ends_as_failed(tmp_path: Path) -> None:
    run_command(
        "model=tiny", "evaluation.perplexity.seqlen=100000", cwd=tmp_path, WANDB_MODE="offline"
    )
    (of_run,) = offline_runs(tmp_path / "runs")
    assert "run_group" not in header(of_run)
    assert of_run[-1]["exit"]["exit_code"] == 1


@contextmanager
def attempt(folder: Path, *overrides: str) -> Iterator[RunLogger]:
    """Open the logger of a job in `folder`/run."""
    config = read_config(composed("model=tiny", "logger=wandb", f"runs_dir={folder}", *overrides))
    with open_logger(config, folder / "run") as logger:
        yield logger


@pytest.mark.parametrize(
    ("login", "variable", "modes"),
    [
        (False, None, []),
        (True, None, ["online"]),
        (AuthenticationError("no answer"), None, ["offline"]),
        (False, "offline", ["offline"]),
        (True, "disabled", []),
        (
            False,
            "online",
            ["online", "offline"],
        ),  # its server refuses, which costs no run its result
    ],
)
def test_the_default_is_wandb_where_a_key_is_configured_or_its_mode_is_said(
    login: bool | Exception,
    variable: str | None,
    modes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []

    def log_in(prompt: bool) -> bool:
        assert not prompt
        if isinstance(login, Exception):
            raise login
        return login

    def init(mode: str, **_: Any) -> SimpleNamespace:
        started.append(mode)
        if len(started) < len(modes):
            raise AuthenticationError("no answer")
        return SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda exit_code: None)

    monkeypatch.setattr("wandb.login", log_in)
    monkeypatch.setattr("wandb.init", init)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with attempt(tmp_path, "logger=auto") as logger:
        assert isinstance(logger, _WandB) == bool(modes)
    assert started == modes


def test_a_resumed_run_is_the_same_one_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    with suppress(KeyboardInterrupt), attempt(tmp_path) as logger:
        for step in range(3):
            logger.log({"loss": 2.0 - step}, step)
            if step == 1:
                logger.log_epoch({"epoch": 1, "loss": 1.5, "measured_loss": None}, 1)
        raise KeyboardInterrupt
    assert not (tmp_path / "run" / LOGGED).exists()
    time.sleep(1.1)  # folders are named by the second
    with attempt(tmp_path) as logger:
        for step in range(2, 4):
            logger.log({"loss": 2.0 - step / 2}, step)
        logger.log_epoch({"epoch": 2, "loss": 0.75, "measured_loss": 0.5}, 2)
        logger.summary({"status": "finished"})
    of_runs = offline_runs(tmp_path)
    assert [header(of_run)["run_id"] for of_run in of_runs] == [
        (tmp_path / "run" / WANDB_ID).read_text().strip()
    ] * 2
    assert all(header(of_run)["resume"] for of_run in of_runs)
    # A step that was done again has the number that it had: W&B keeps one of the two.
    assert [[row["_step"] for row in rows(of_run)] for of_run in of_runs] == [
        [0, 2, 3, 4],
        [4, 6, 7],
    ]


def test_rows_that_wandb_has_are_not_sent_again() -> None:
    sent: list[int] = []
    run = SimpleNamespace(starting_step=4, define_metric=lambda *_, **__: None)
    run.log = lambda values, step, commit: sent.append(step)
    logger = _WandB(run)
    for step in range(4):
        logger.log({"loss": 1.0}, step)
        if step % 2:
            logger.log_epoch({"loss": 1.0}, step // 2 + 1)
    assert sent == [4, 6, 7]


def test_names_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    single, asked = (
        read_config(composed("model=tiny", *more)) for more in ([], ["logger.group=mine"])
    )
    monkeypatch.delenv("PERMLLM_SWEEP", raising=False)
    assert described(single, Path("y"))["group"] is None
    monkeypatch.setenv("PERMLLM_SWEEP", "table6-1a2b3c4d")
    assert [described(one, Path("y"))["group"] for one in (single, asked)] == [
        "table6-1a2b3c4d",
        "mine",
    ]
    words = [
        "experiment=table6",
        "+logger.group=x",
        "logger=wandb",
        "runs_dir=a",
        "run_dir=b",
        "++force=true",
    ]
    for typed, name in (
        ([*words, "block_size=32", "~x"], "block_size=32 ~x"),
        (words, "y"),
        (["a" * 200], "a" * 128),
    ):
        monkeypatch.setattr("permllm.runs.sweep.overrides", lambda typed=typed: typed)
        assert described(single, Path("runs/y"))["name"] == name


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's curves of a run."""
    accumulators = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def test_tensorboard_has_the_last_run_alone(cache: Path, tmp_path: Path) -> None:
    words = ("model=tiny", "logger=tensorboard", f"runs_dir={tmp_path}")
    for force in ("false", "true"):
        result = job.run(read_config(composed(*words, f"force={force}")))
    assert result is not None
    found, epochs = scalars(result[1]), read_lines(result[1] / "history.jsonl")
    assert found["epoch/loss"] == [
        (number, pytest.approx(entry["loss"])) for number, entry in enumerate(epochs, 1)
    ]
    assert {"lcp/loss", "lcp/temperature", *numbers_of(result[0])} <= found.keys()


def mlflow_runs(home: Path) -> list[Any]:
    client = import_module("mlflow").MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "permllm"]
    return list(client.search_runs([experiment.experiment_id]))


def test_mlflow_has_the_curves_and_final_numbers_and_a_finished_run_goes_to_another_logger(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PERMLLM_SWEEP", "table6-1a2b3c4d")
    monkeypatch.chdir(tmp_path)
    result = job.run(read_config(composed("model=tiny", "logger=mlflow", "runs_dir=runs")))
    assert result is not None
    metrics, directory = result
    assert [file.name for file in tmp_path.iterdir() if file != cache] == ["runs"]
    (run,) = mlflow_runs(tmp_path / "runs")
    assert run.info.status == "FINISHED"
    expected = {
        "group": "table6-1a2b3c4d",
        "pruner": "wanda",
        "permutation": "lcp",
        "sparsity": "2:4",
        "model": "tiny",
    }
    assert (
        run.data.tags.items()
        >= (expected | {"job_type": "learn", "config_hash": metrics["config_hash"]}).items()
    )
    assert (
        run.data.params.items() >= {"block_size": "64", "pruner.name": "wanda", "seed": "0"}.items()
    )
    assert run.data.metrics.items() >= numbers_of(metrics).items()
    client = import_module("mlflow").MlflowClient(
        tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    )
    losses = [
        (point.step, point.value)
        for point in client.get_metric_history(run.info.run_id, "epoch/loss")
    ]
    assert losses == [
        (number, entry["loss"])
        for number, entry in enumerate(read_lines(directory / "history.jsonl"), 1)
    ]

    for _ in range(2):  # the second time it is there
        assert job.run(
            read_config(composed("model=tiny", "logger=tensorboard", "runs_dir=runs"))
        ) == (metrics, directory)
    found = scalars(directory)
    assert [step for step, _ in found["epoch/loss"]] == [1, 2, 3]
    assert numbers_of(metrics).keys() <= found.keys()
    assert {file.name for file in (directory / LOGGED).iterdir()} == {"mlflow", "tensorboard"}


def test_a_failed_run_is_failed_in_mlflow_and_a_key_is_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with suppress(ZeroDivisionError), attempt(tmp_path, "logger=mlflow") as logger:
        logger.log({"loss": float("nan"), "flips": 0.5}, 0)
        logger.summary({"tasks/x(y)/acc,none": 0.5, "text": "words"})
        raise ZeroDivisionError
    (run,) = mlflow_runs(tmp_path)
    assert run.info.status == "FAILED"
    assert run.data.metrics.items() >= {"lcp/flips": 0.5, "tasks/x_y_/acc_none": 0.5}.items()
    assert not (tmp_path / "run" / LOGGED).exists()


def test_without_mlflow_or_its_server_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with attempt(
        tmp_path, "logger=mlflow"
    ) as logger:  # a server that is down costs no run its result
        logger.log({"loss": 1.0}, 0)
    assert "MLflow cannot be reached" in caplog.text
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with (
        pytest.raises(ConfigError, match=r"pip install -e '\.\[mlflow\]'"),
        attempt(tmp_path, "logger=mlflow"),
    ):
        pass


def test_a_logger_that_fails_costs_the_curves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with attempt(tmp_path, "logger=tensorboard") as logger:
        logger.log({"loss": 1.0}, 0)
        monkeypatch.setattr(
            "torch.utils.tensorboard.SummaryWriter.add_scalar", lambda *_, **__: 1 / 0
        )
        for step in range(1, 4):
            logger.log({"loss": 1.0}, step)
    assert caplog.text.count("the logger fails (division by zero)") == 1
