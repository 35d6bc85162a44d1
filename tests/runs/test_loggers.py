"""What W&B, MLflow and TensorBoard get: names, groups, axes, curves, final numbers; and the tables that are made from it."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from permllm.runs.mlflow_logger import DATABASE, MLFLOW_ID, MlflowLogger, open_mlflow
from wandb.errors import AuthenticationError

from permllm import job
from permllm.cli import main
from permllm.config import read_config
from permllm.errors import ConfigError, DataError
from permllm.runs import wandb_report as wandb_runs
from permllm.runs.figures import flat_figures, nats_above_dense
from permllm.runs.loggers import WANDB_ID, RunLogger, _WandB, job_group, job_name, open_logger
from permllm.runs.published import published
from permllm.runs.read import Run, collect
from tests.conftest import run_command, run_module
from tests.data.test_texts import in_the_wheel
from tests.test_config import composed

SWEEP = ("-m", "model=tiny", "block_size=16,32", "seed=0,1", "calibration.samples=4", "logger=wandb", "force=false")
RESULTS = ("perplexity/sparse/wikitext2/value", "zero_shot/sparse/rte/acc")
STEP_VALUES = {"loss", "temperature", "flips", "seconds"}


def records(file: Path) -> list[dict[str, Any]]:
    """What a run wrote, as wandb's own command prints it."""
    printed = run_module("wandb", "leet", "inspect", str(file), "--json")
    assert printed.returncode == 0, printed.stderr
    return [json.loads(line) for line in printed.stdout.splitlines()]


def rows(of_run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in of_run if "history" in record]


def header(of_run: list[dict[str, Any]]) -> dict[str, Any]:
    return next(dict(record["run"]) for record in of_run if "run" in record)


def offline_runs(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs_dir of a sweep over two block sizes and two seeds, logged offline."""
    folder = tmp_path_factory.mktemp("sweep")
    result = run_command(*SWEEP, cwd=folder, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert "wandb" not in result.stderr.lower()
    return folder / "runs"


@pytest.fixture(scope="module")
def logged(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of its runs, by name."""
    of_runs = [records(file) for file in offline_runs(sweep)]
    return {header(of_run)["display_name"]: of_run for of_run in of_runs}


def test_runs_are_named_by_what_was_typed_and_grouped_by_their_sweep(
    sweep: Path, logged: dict[str, list[dict[str, Any]]]
) -> None:
    assert set(logged) == {
        f"model=tiny block_size={size} seed={seed} calibration.samples=4" for size in (16, 32) for seed in (0, 1)
    }
    headers = [header(of_run) for of_run in logged.values()]
    (group,) = {one["run_group"] for one in headers}
    assert group.startswith("sweep-")
    assert (sweep / "sweeps" / group).is_dir()
    for one in headers:
        assert one["project"] == "permllm"
        assert one["job_type"] == "learn"
        assert one["tags"] == ["wanda", "lcp", "2:4", "tiny"]
        config = one["config"]["update"]
        directory = sweep.parent / config["run_directory"]
        assert (directory / WANDB_ID).read_text().strip() == one["run_id"]
        assert config["config_hash"] == json.loads((directory / "metrics.json").read_text())["config_hash"]
        assert config["block_size"] in (16, 32)
        assert "logger" not in config


def test_every_value_has_its_axis(logged: dict[str, list[dict[str, Any]]]) -> None:
    places = [f"pass/{name}" for name in ("first_layer", "last_layer")]
    for of_run in logged.values():
        metrics = {record["metric"]["name"]: record["metric"] for record in of_run if "metric" in record}
        named = {key for row in rows(of_run) for key in row if not key.startswith("_")}
        updates = [record["summary"]["update"] for record in of_run if "summary" in record]
        (final,) = [update for update in updates if "status" in update]
        numbers = {key for key, value in final.items() if isinstance(value, int | float)}
        assert set(metrics) == named | numbers
        for name, metric in metrics.items():
            if name in ("lcp/step", "lcp/pass"):
                assert metric["options"]["hidden"]
            elif name in numbers:
                assert "step_metric" not in metric
                assert metric["summary"] == {"last": True}
            else:
                assert metric["step_metric"] == ("lcp/step" if name.startswith("lcp/") else "lcp/pass")
                assert metric.get("summary") == ({"min": True} if name.endswith("loss") else None)
                assert metric["options"].get("hidden", False) == (name in ("pass/pass", *places))


def test_curves_are_those_of_the_record(sweep: Path, logged: dict[str, list[dict[str, Any]]]) -> None:
    for of_run in logged.values():
        directory = sweep.parent / header(of_run)["config"]["update"]["run_directory"]
        steps = [row for row in rows(of_run) if "lcp/step" in row]
        assert [row["lcp/step"] for row in steps] == list(range(len(steps)))
        assert all({f"lcp/{name}" for name in STEP_VALUES} <= set(row) for row in steps)
        temperatures = [row["lcp/temperature"] for row in steps]
        assert temperatures[0] == 1.0
        assert temperatures == sorted(temperatures, reverse=True)

        passes = [row for row in rows(of_run) if "lcp/pass" in row]
        history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
        assert [row["lcp/pass"] for row in passes] == [1, 2, 3] == [entry["pass"] for entry in history]
        for row, entry in zip(passes, history, strict=True):
            measured = {key: value for key, value in entry.items() if value is not None}
            assert {key.removeprefix("pass/"): row[key] for key in row if key.startswith("pass/")} == measured
        numbers = [row["_step"] for row in rows(of_run)]
        assert numbers == sorted(set(numbers))


def test_final_values_are_those_of_the_metrics(sweep: Path, logged: dict[str, list[dict[str, Any]]]) -> None:
    for of_run in logged.values():
        summary: dict[str, Any] = {}
        for record in of_run:
            summary |= record["summary"]["update"] if "summary" in record else {}
        directory = sweep.parent / header(of_run)["config"]["update"]["run_directory"]
        metrics = json.loads((directory / "metrics.json").read_text())
        for which in ("dense", "sparse"):
            for key, value in metrics["perplexity"][which]["builtin"].items():
                assert summary[f"perplexity/{which}/builtin/{key}"] == value
        assert summary["status"] == "finished"
        seconds = metrics["seconds"]
        assert summary["minutes"] == pytest.approx((seconds["calibrate"] + seconds["permute"] + seconds["prune"]) / 60)
        dense, sparse = (metrics["perplexity"][which]["builtin"]["value"] for which in ("dense", "sparse"))
        assert summary["nats_above_dense"] == pytest.approx(math.log(sparse / dense))
        assert {key[8:]: value for key, value in summary.items() if key.startswith("seconds/")} == metrics["seconds"]
        mean = sum(metrics["retained_saliency"].values()) / len(metrics["retained_saliency"])
        assert summary["retained_saliency/mean"] == pytest.approx(mean)
        losses = [row["lcp/loss"] for row in rows(of_run) if "lcp/loss" in row]
        assert summary["lcp/loss"] == {"min": min(losses)}
        assert of_run[-1]["exit"].get("exit_code", 0) == 0


def test_a_failed_job_ends_as_failed(tmp_path: Path) -> None:
    result = run_command("model=tiny", "evaluation.perplexity.seqlen=100000", cwd=tmp_path, WANDB_MODE="offline")
    assert result.returncode == 1
    assert "fewer than one evaluation.perplexity.seqlen" in result.stderr
    (file,) = offline_runs(tmp_path / "runs")
    of_run = records(file)
    assert header(of_run)["display_name"] == "model=tiny evaluation.perplexity.seqlen=100000"
    assert "run_group" not in header(of_run)
    assert of_run[-1]["exit"]["exit_code"] == 1


@contextmanager
def attempt(folder: Path, *overrides: str) -> Iterator[RunLogger]:
    """The logger of a job in `folder`/run."""
    config = read_config(composed("model=tiny", "logger=wandb", f"runs_dir={folder}", *overrides))
    with open_logger(config, folder / "run") as logger:
        yield logger


@pytest.mark.parametrize(
    ("login", "variable", "mode"),
    [
        (False, None, None),
        (True, None, "online"),
        (AuthenticationError("no answer"), None, "offline"),
        (False, "offline", "offline"),
        (True, "disabled", None),
    ],
)
def test_the_default_is_wandb_where_a_key_is_configured_or_its_mode_is_said(
    login: bool | Exception, variable: str | None, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def log_in(prompt: bool) -> bool:
        assert not prompt
        if isinstance(login, Exception):
            raise login
        return login

    def init(mode: str, **_: Any) -> SimpleNamespace:
        started.append(mode)
        return SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda exit_code: None)

    monkeypatch.setattr("wandb.login", log_in)
    monkeypatch.setattr("wandb.init", init)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with attempt(tmp_path, "logger=auto") as logger:
        assert isinstance(logger, _WandB) == bool(mode)
    assert started == [mode] * bool(mode)
    assert (tmp_path / "run" / WANDB_ID).exists() == bool(mode)


def test_a_continued_run_is_the_same_one_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    def interrupted() -> None:
        with attempt(tmp_path) as logger:
            for step in range(2):
                logger.log({"loss": 2.0 - step}, step)
            logger.log_pass({"pass": 1, "loss": 1.5, "measured_loss": None}, 1)
            logger.log({"loss": 1.0}, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    time.sleep(1.1)  # folders are named by the second
    with attempt(tmp_path) as logger:
        for step in range(2, 4):
            logger.log({"loss": 2.0 - step / 2}, step)
        logger.log_pass({"pass": 2, "loss": 0.75, "measured_loss": 0.5}, 2)
        logger.summary({"status": "finished"})
    headers = [header(records(file)) for file in offline_runs(tmp_path)]
    assert [one["run_id"] for one in headers] == [(tmp_path / "run" / WANDB_ID).read_text().strip()] * 2
    assert all(one["resume"] for one in headers)
    (run,) = wandb_runs.read_offline(tmp_path, "permllm")
    assert run.state == "finished"
    # The step that was done again has the number that it had: W&B keeps one of the two.
    assert [row["_step"] for row in run.history] == [0, 2, 3, 4, 4, 6, 7]
    assert [row["lcp/pass"] for row in run.history if "lcp/pass" in row] == [1, 2]

    with attempt(tmp_path, "force=true"):
        pass
    assert len({run.id for run in wandb_runs.read_offline(tmp_path, "permllm")}) == 2


def test_rows_that_wandb_has_are_not_sent_again() -> None:
    sent: list[int] = []

    class Online:
        starting_step = 4

        def define_metric(self, name: str, **_: Any) -> None:
            pass

        def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
            sent.append(step)

    logger = _WandB(Online())
    for step in range(4):
        logger.log({"loss": 1.0}, step)
        if step % 2:
            logger.log_pass({"loss": 1.0}, step // 2 + 1)
    assert sent == [4, 6, 7]


def test_the_group_is_what_was_asked_for_or_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    single, asked = (read_config(composed("model=tiny", *more)) for more in ([], ["logger.group=mine"]))
    monkeypatch.delenv("PERMLLM_SWEEP", raising=False)
    assert job_group(single) is None
    monkeypatch.setenv("PERMLLM_SWEEP", "table6-1a2b3c4d")
    assert job_group(single) == "table6-1a2b3c4d"
    assert job_group(asked) == "mine"


def test_a_name_leaves_out_what_says_nothing_about_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=table6", "+logger.group=x", "logger=wandb", "runs_dir=a", "run_dir=b", "++force=true"]
    monkeypatch.setattr("permllm.runs.sweep.overrides", lambda: [*words, "block_size=32", "~x"])
    assert job_name(Path("runs/y")) == "block_size=32 ~x"
    monkeypatch.setattr("permllm.runs.sweep.overrides", lambda: words)
    assert job_name(Path("runs/y")) == "y"
    monkeypatch.setattr("permllm.runs.sweep.overrides", lambda: ["model.path=" + "a" * 200])
    assert len(job_name(Path("runs/y"))) == 128


def test_tensorboard_gets_the_passes_of_the_last_run(cache: Path, tmp_path: Path) -> None:
    words = ("model=tiny", "logger=tensorboard", f"runs_dir={tmp_path}")
    job.run(read_config(composed(*words)))
    result = job.run(read_config(composed(*words, "force=true")))
    assert result is not None
    accumulators = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(result[1] / "tensorboard"))
    events.Reload()
    history = [json.loads(line) for line in (result[1] / "history.jsonl").read_text().splitlines()]
    assert {"lcp/loss", "lcp/temperature", "perplexity/sparse/builtin/value"} <= set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("pass/loss")]
    assert found == [(number, pytest.approx(entry["loss"])) for number, entry in enumerate(history, 1)]


@pytest.fixture(scope="module")
def mlflow_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A runs_dir with MLflow's database, and a run in it."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PERMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PERMLLM_SWEEP", "table6-1a2b3c4d")
        patch.chdir(folder)
        result = job.run(read_config(composed("model=tiny", "logger=mlflow", "runs_dir=runs")))
    assert result is not None
    assert sorted(file.name for file in folder.iterdir()) == ["runs"]
    assert sorted(file.name for file in (folder / "runs").iterdir()) == sorted([f".{DATABASE}.lock", DATABASE, result[1].name])
    return folder / "runs", folder / result[1]


@pytest.fixture
def mlflow_home(mlflow_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a database that is made already, which takes seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_run[0] / DATABASE, tmp_path)
    return tmp_path


def mlflow_client(home: Path) -> Any:
    return import_module("mlflow").MlflowClient(tracking_uri=f"sqlite:///{home / DATABASE}")


def points(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_mlflow_gets_what_the_record_has(mlflow_run: tuple[Path, Path]) -> None:
    home, directory = mlflow_run
    client = mlflow_client(home)
    run = client.get_run((directory / MLFLOW_ID).read_text().strip())
    metrics = json.loads((directory / "metrics.json").read_text())
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "permllm"
    expected = {"group": "table6-1a2b3c4d", "pruner": "wanda", "permutation": "lcp", "sparsity": "2:4", "model": "tiny"}
    expected |= {"job_type": "learn", "config_hash": metrics["config_hash"], "final/status": "finished"}
    assert run.data.tags.items() >= expected.items()
    assert run.data.params.items() >= {"block_size": "64", "pruner.name": "wanda", "seed": "0"}.items()
    evaluated = {key: value for key, value in run.data.tags.items() if key.startswith("evaluation.perplexity.")}
    assert {"builtin", "64"} <= set(evaluated.values())
    assert not any(key.startswith("evaluation.") for key in run.data.params)  # which a later evaluation could not change
    history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    for name in ("loss", "temperature"):
        values = [(number, entry[name]) for number, entry in enumerate(history, 1)]
        assert points(client, run.info.run_id, f"pass/{name}") == values
    losses = points(client, run.info.run_id, "lcp/loss")
    assert [step for step, _ in losses] == list(range(len(losses)))
    assert len(losses) > len(history)
    final = run.data.metrics
    for which in ("dense", "sparse"):
        assert final[f"perplexity/{which}/builtin/value"] == metrics["perplexity"][which]["builtin"]["value"]
    seconds = metrics["seconds"]
    minutes = (seconds["calibrate"] + seconds["permute"] + seconds["prune"]) / 60
    assert final["minutes"] == pytest.approx(minutes)


def test_a_continued_run_is_the_same_one_in_mlflow(mlflow_home: Path) -> None:
    def interrupted() -> None:
        with attempt(mlflow_home, "logger=mlflow") as logger:
            for step in range(3):
                logger.log({"loss": 2.0 - step}, step)
            logger.log_pass({"pass": 1, "loss": 1.5, "measured_loss": None}, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    client, file = mlflow_client(mlflow_home), mlflow_home / "run" / MLFLOW_ID
    run_id = file.read_text().strip()
    assert client.get_run(run_id).info.status == "FAILED"
    with attempt(mlflow_home, "logger=mlflow") as logger:
        assert client.get_run(run_id).info.status == "RUNNING"
        for step in range(2, 5):  # step 2 is done again
            logger.log({"loss": 10.0 + step}, step)
        logger.log_pass({"pass": 1, "loss": 9.0}, 1)
        logger.log_pass({"pass": 2, "loss": 0.75, "measured_loss": 0.5}, 2)
        logger.summary({"status": "finished"})
    assert file.read_text().strip() == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert points(client, run_id, "lcp/loss") == [(0, 2.0), (1, 1.0), (2, 0.0), (3, 13.0), (4, 14.0)]
    assert points(client, run_id, "pass/loss") == [(1, 1.5), (2, 0.75)]
    assert points(client, run_id, "pass/measured_loss") == [(2, 0.5)]
    with attempt(mlflow_home, "logger=mlflow", "force=true"):
        pass
    assert file.read_text().strip() != run_id
    file.write_text("of another server")
    with attempt(mlflow_home, "logger=mlflow"):
        pass
    assert client.get_run(file.read_text().strip()).info.status == "FINISHED"


def test_mlflow_takes_what_its_fields_do_not(mlflow_home: Path, tmp_path: Path) -> None:
    settings = {f"a{number}": number for number in range(250)} | {"a?b=c": "x" * 10_000, "k" * 300: None}
    arguments = {"project": "odd", "name": "n", "tags": {}, "settings": settings, "force": False}
    with open_mlflow(mlflow_home, tmp_path, **arguments) as logger:
        assert logger is not None
        logger.log({"loss": float("nan"), "flips": 0.5}, 0)
        logger.summary({"perplexity/x(y)/value": float("inf"), "good": 2.0, "text/ü": "words"}, ["bad", "worse"])
    data = mlflow_client(mlflow_home).get_run((tmp_path / MLFLOW_ID).read_text().strip()).data
    assert len(data.params) == 252
    assert data.params["a_b_c"] == "x" * 6000
    assert data.params["k" * 250] == "None"
    assert data.metrics == {"lcp/flips": 0.5, "good": 2.0}
    assert data.tags["final/perplexity/x_y_/value"] == "inf"
    assert data.tags["of_earlier_evaluations"] == "bad, worse"


def test_mlflow_says_how_the_model_was_evaluated_last(mlflow_home: Path, tmp_path: Path) -> None:
    said = []
    for settings in (
        {"evaluation.tasks.a.limit": 5, "evaluation.perplexity.seqlen": 64},
        {"evaluation.perplexity.seqlen": 32},
    ):
        with open_mlflow(mlflow_home, tmp_path, project="odd", name="n", tags={}, settings=settings, force=False):
            pass
        data = mlflow_client(mlflow_home).get_run((tmp_path / MLFLOW_ID).read_text().strip()).data
        said.append({key: value for key, value in data.tags.items() if key.startswith("evaluation.")})
    assert said == [
        {"evaluation.tasks.a.limit": "5", "evaluation.perplexity.seqlen": "64"},
        {"evaluation.perplexity.seqlen": "32"},
    ]


def test_without_mlflow_or_its_server_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with attempt(tmp_path, "logger=mlflow") as logger:  # a server that is down costs no run its result
        logger.log({"loss": 1.0}, 0)
    assert "MLflow cannot be reached at http://127.0.0.1:9" in caplog.text
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with (
        pytest.raises(ConfigError, match=r"logger=mlflow needs .*pip install -e '\.\[mlflow\]'"),
        attempt(tmp_path, "logger=mlflow"),
    ):
        pass


def test_a_server_that_goes_away_costs_the_curves_alone(mlflow_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with attempt(mlflow_home, "logger=mlflow") as logger:
        logger.log({"loss": 1.0}, 0)
        assert isinstance(logger, MlflowLogger)

        def broken(*_: Any, **__: Any) -> None:
            raise ConnectionError("gone")

        logger._client.log_batch = broken
        for step in range(1, 4):
            logger.log({"loss": 1.0}, step)
        logger.summary({"good": 2.0})
    assert caplog.text.count("MLflow does not answer (gone)") == 1


def test_the_table_of_offline_runs_is_that_of_the_run_directories(sweep: Path) -> None:
    words = ("--offline", str(sweep), "--table", "table6", "--group", "sweep-*")
    ours = run_module("permllm", "report", *words)
    assert ours.returncode == 0, ours.stderr
    assert "The paper's numbers are those of llama-2-7b" in ours.stderr
    theirs = run_module("permllm", "results", str(sweep), "--paper", "table6")
    # A random model has other weights for each seed, and the dense row is that of whichever run comes first.
    lines = [[line for line in text.splitlines() if "| dense" not in line] for text in (ours.stdout, theirs.stdout)]
    assert lines[0] == lines[1]
    assert "| block_size | seeds |" in ours.stdout
    assert "| 16 | 2 |" in ours.stdout
    assert "±" in ours.stdout


def test_offline_runs_are_read_as_they_were_kept(sweep: Path) -> None:
    runs = [wandb_runs.as_run(run) for run in wandb_runs.read_offline(sweep, "permllm")]
    read, kept = (
        {(run.config["seed"], run.config["block_size"]): run for run in some} for some in (runs, collect([sweep]).runs)
    )
    assert set(read) == set(kept)
    for key, run in read.items():
        assert run.history == kept[key].history
        assert run.metrics["perplexity"] == kept[key].metrics["perplexity"]
        assert run.metrics["seconds"] == kept[key].metrics["seconds"]


def test_another_evaluation_of_a_run_takes_the_place_of_the_one_before(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = {"support": [f"a passage, number {n}" for n in range(40)], "question": [f"What is {n}?" for n in range(40)]}
    in_the_wheel(rows, tmp_path, monkeypatch)
    words = ("model=tiny", "permutation=none", "logger=wandb", "calibration.samples=4", f"runs_dir={tmp_path}/runs")
    for names in ("builtin", "[sciq-support,builtin]"):
        asked = read_config(composed(*words, f"evaluation.perplexity.dataset={names}", "evaluation.perplexity.limit=2"))
        made = job.run(asked)
        time.sleep(1.1)  # folders are named by the second
        (logged,) = wandb_runs.read_offline(tmp_path / "runs", "permllm")
        assert made is not None
        assert wandb_runs.as_run(logged).metrics["perplexity"] == made[0]["perplexity"]
        shown = {name: value for name, value in logged.summary.items() if not name.startswith("_")}
        assert shown == flat_figures(made[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "table6", "--group", "*", "--wandb", "other"], "no runs of the project other"),
        (["--table", "table9"], "--table table9"),
        (["--table", "6", "--publish"], "leave out --offline"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--offline", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_key_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr("wandb.Api", refuse)
    assert main(["report", "--wandb", "permllm", "--table", "table6"]) == 1
    assert capsys.readouterr().err == "error: W&B cannot be reached: No API key configured.\n"


def online_run(number: int, *, state: str = "finished", group: str = "table6-1a2b3c4d", **changed: Any) -> SimpleNamespace:
    """A run as `wandb.Api` gives it, measured on WikiText-2 and a task."""
    block_size = changed.get("block_size", 64)
    config = {
        "_wandb": {},
        "run_directory": f"runs/{number}",
        "config_hash": str(number),
        "name": "x",
        "model": {"name": changed.get("model", "llama-2-7b")},
        "sparsity": "2:4",
        "pruner": {"name": "wanda"},
        "permutation": {"name": "lcp-paper", "uses": ["block_size"], "sinkhorn_iterations": 5},
        "mask": {"name": "pruner"},
        "reconstruction": {"name": "none"},
        "block_size": block_size,
        "seed": changed.get("seed", 0),
        "calibration": {"dataset": "c4"},
    }
    summary = {
        "_step": 10,
        "schema_version": 2,
        "status": "finished",
        "lcp/loss": {"min": 0.1},
        "pass/loss": {"min": 0.2},
        "seconds/permute": 5.0,
        "name": "x",
        "config_hash": str(number),
        "peak_memory_bytes": 1,
        "sparsity/pattern": "2:4",
        "sparsity/fraction": 0.5,
        "sparsity/of_model": 0.5,
        "sparsity/violations": 0,
        "retained_saliency/mean": 0.6,
        "output_error/mean": 0.1,
        "perplexity/dense/wikitext2/value": 5.0,
        "perplexity/dense/wikitext2/window": 2048,
        "perplexity/dense/wikitext2/tokens": 100,
        "perplexity/sparse/wikitext2/tokens": 100,
        "perplexity/sparse/wikitext2/value": changed.get("perplexity", 9.5),
        "perplexity/sparse/wikitext2/window": 2048,
        "zero_shot/sparse/rte/acc": 0.5,
        "zero_shot/dense/rte/acc": 0.7,
    }
    summary["minutes"] = changed.get("minutes", 2.5)
    for which in ("dense", "sparse"):
        summary[f"zero_shot/{which}/rte/n"] = 10
        summary |= {f"zero_shot/{which}/{task}/limited": False for task in ("rte", "perplexity_task")}
    return SimpleNamespace(
        id=f"id{number}", name=f"run {number}", group=group, state=state, config=config, summary_metrics=summary
    )


class FakeApi:
    """`wandb.Api` with some runs."""

    default_entity = "me"

    def __init__(self, runs: list[SimpleNamespace]) -> None:
        self._runs = runs
        self.asked: list[str] = []

    def runs(self, path: str, order: str) -> list[SimpleNamespace]:
        assert order == "+created_at"
        self.asked.append(path)
        return self._runs


def test_runs_of_the_api_become_a_table_beside_the_papers() -> None:
    runs = [
        online_run(1, seed=0, perplexity=9.4),
        online_run(2, seed=1, perplexity=9.8),
        online_run(3, block_size=32, perplexity=float("inf")),
        online_run(4, block_size=32, perplexity=9.0),
        online_run(5, state="crashed", block_size=128),
        online_run(6, group="table1-00000000", block_size=128),
    ]
    found = wandb_runs.read_api(FakeApi(runs), "me/permllm", ["table6", "table6-*"])
    assert [run.config == {} for run in found] == [False] * 5 + [True]
    of_group = [run for run in found if wandb_runs.chosen(run.group, ["table6", "table6-*"])]
    (table,), notes = wandb_runs.tables(of_group, published("table6"))
    assert table.ids == ["id1", "id2", "id4"]
    assert notes == [
        "run 4 (id4) has the settings of id3, which is older and is not counted",
        "skipped run 5 (id5): not finished (crashed)",
    ]
    lines = wandb_runs.text([table], "md").splitlines()
    paper = {row.setting: row.value for row in published("table6") if row.metric == "wikitext2_ppl"}
    columns = ["block_size", "seeds", "wikitext2 perplexity (window 2048)", "paper, llama-2-7b", "difference", "rte acc"]
    assert lines[0].startswith(f"| {' | '.join(columns)} |")
    assert lines[3].startswith(f"| 32 | 1 | 9.00 | {paper['block_size=32']:.2f} | {9 - paper['block_size=32']:+.2f} | 50.00%")
    assert lines[4].startswith(f"| 64 | 2 | 9.60 ± 0.28 | {paper['block_size=64']:.2f} |")
    assert json.loads(wandb_runs.text([table], "json"))[1]["seeds"] == [0, 1]


def test_each_model_has_a_table_of_its_own() -> None:
    runs = [online_run(1, model="qwen2.5-7b"), online_run(2), online_run(3, block_size=32)]
    found, _ = wandb_runs.tables(wandb_runs.read_api(FakeApi(runs), "x", ["*"]), published("table1"))
    assert [table.model for table in found] == ["llama-2-7b", "qwen2.5-7b"]
    assert wandb_runs.text(found, "md").count("\n## ") == 1
    assert len(json.loads(wandb_runs.text(found, "json"))) == 3


def test_what_goes_wrong_at_wandb_is_one_error() -> None:
    class Broken(FakeApi):
        def runs(self, path: str, order: str) -> list[SimpleNamespace]:
            raise ValueError("Could not find project")

    with pytest.raises(DataError, match="the runs of a/b cannot be had from W&B: Could not find project"):
        wandb_runs.read_api(Broken([]), "a/b", ["*"])
    with pytest.raises(ConfigError, match=r"no finished run is among them; skipped run 1 \(id1\)"):
        wandb_runs.tables(wandb_runs.read_api(FakeApi([online_run(1, state="failed")]), "x", ["*"]), published("6"))
    other = online_run(1)
    other.summary_metrics["schema_version"] = 7
    with pytest.raises(DataError, match="schema_version is 7"):
        wandb_runs.as_run(wandb_runs.read_api(FakeApi([other]), "x", ["*"])[0])


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("summary_metrics", "seconds/permute", None, "final values: seconds.permute"),
        ("config", "permutation", None, "settings: permutation"),
    ],
)
def test_a_logged_run_of_another_form_is_a_note_and_the_others_are_a_table(
    part: str, name: str, value: Any, message: str
) -> None:
    runs = [online_run(1), online_run(2, block_size=32)]
    values = getattr(runs[1], part)
    setattr(runs[1], part, {name: value} | {key: kept for key, kept in values.items() if key != name})
    (table,), notes = wandb_runs.tables(wandb_runs.read_api(FakeApi(runs), "x", ["*"]), published("6"))
    assert table.ids == ["id1"]
    assert re.fullmatch(rf"skipped run 2 \(id2\): {message}.*", notes[0])


def test_numbers_that_json_has_not_are_read() -> None:
    (run,) = wandb_runs.read_api(FakeApi([online_run(1, perplexity="Infinity")]), "x", ["*"])
    read = wandb_runs.as_run(run)
    assert isinstance(read, Run)
    assert read.metrics["perplexity"]["sparse"]["wikitext2"]["value"] == float("inf")
    assert read.metrics["zero_shot"]["sparse"]["rte"]["stderr"] is None


def test_the_report_has_the_table_and_panels_of_the_runs_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wr, interface = (import_module(f"wandb_workspaces.reports.v2{part}") for part in ("", ".interface"))
    runs = [online_run(1), online_run(2, block_size=32), online_run(3, model="qwen2.5-7b")]
    found, _ = wandb_runs.tables(wandb_runs.read_api(FakeApi(runs), "x", ["*"]), published("table6"))
    report = wandb_runs.report(found, "permllm", "me", "PermLLM, table6")
    kinds = [type(block) for block in report.blocks]
    grids = [wr.PanelGrid, wr.PanelGrid]
    assert kinds == [wr.H2, wr.MarkdownBlock, *grids, wr.H2, wr.MarkdownBlock, wr.P, *grids]
    assert report.blocks[1].text == wandb_runs.text(found[:1], "md")

    # Making the specification looks the project up.
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "1"}})
    over_minutes, grid = (specified(block)["metadata"] for block in report.blocks[2:4])
    for one in (over_minutes, grid):
        assert one["runSets"][0]["filters"]["filters"][0]["value"] == ["id1", "id2"]
    scatters = [panel["config"] for panel in over_minutes["panelBankSectionConfig"]["panels"]]
    assert [panel["xAxis"] for panel in scatters] == ["summary:minutes"] * 2
    assert [panel["yAxis"] for panel in scatters] == [f"summary:{name}" for name in RESULTS]
    assert [key["name"] for key in grid["runSets"][0]["grouping"]] == ["block_size.value"]
    panels = [panel["config"] for panel in grid["panelBankSectionConfig"]["panels"]]
    assert [panel["metrics"] for panel in panels if "xAxis" not in panel] == [[name] for name in RESULTS]
    assert ("lcp/step", "lcp/loss") in [(panel["xAxis"], *panel["metrics"]) for panel in panels if "xAxis" in panel]


def test_several_texts_have_one_number_in_wandb() -> None:
    perplexity = {"dense": {"a": {"value": 5.0}, "b": {"value": 8.0}}, "sparse": {"a": {"value": 10.0}, "b": {"value": 64.0}}}
    assert nats_above_dense(perplexity) == pytest.approx((math.log(2) + math.log(8)) / 2)
    run = online_run(1)
    for which in ("dense", "sparse"):
        for key in ("value", "window", "tokens"):
            run.summary_metrics[f"perplexity/{which}/c4/{key}"] = run.summary_metrics[f"perplexity/{which}/wikitext2/{key}"]
    run.summary_metrics["nats_above_dense"] = 0.6
    found, notes = wandb_runs.tables(wandb_runs.read_api(FakeApi([run]), "x", ["*"]), published("table6"))
    assert notes == []
    view = specified(wandb_runs.workspace(found, "permllm", "me", "PermLLM"))
    (section,) = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert section["panels"][0]["config"]["yAxis"] == "summary:nats_above_dense"


def specified(part: Any) -> dict[str, Any]:
    """What would be sent."""
    return dict(part._to_model().model_dump(by_alias=True, exclude_none=True))


def test_publishing_saves_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []

    def save(report: Any) -> SimpleNamespace:
        saved.append(report)
        return SimpleNamespace(url="https://wandb.ai/me/permllm/reports/1")

    api = FakeApi([online_run(1), online_run(2, block_size=32)])
    monkeypatch.setattr("wandb.Api", lambda: api)
    monkeypatch.setattr("wandb_workspaces.reports.v2.Report.save", save)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", save)
    assert main(["report", "--wandb", "permllm", "--table", "table6", "--publish"]) == 0
    assert api.asked == ["me/permllm"]
    report, workspace = saved
    assert (report.entity, report.title) == ("me", "PermLLM, table6")
    assert (workspace.entity, workspace.name) == ("me", "PermLLM, table6")
    printed = capsys.readouterr().out
    assert printed.startswith("| block_size |")
    assert printed.endswith("https://wandb.ai/me/permllm/reports/1\n" * 2)
