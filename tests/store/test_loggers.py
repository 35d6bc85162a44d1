"""W&B and TensorBoard: names, groups, curves and final numbers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
from wandb.errors import AuthenticationError

from permllm import job
from permllm.errors import ConfigError
from permllm.report.metrics import flat_metrics
from permllm.settings.config import read_config
from permllm.store.files import WANDB_ID, read_json, read_lines
from permllm.store.loggers import RunLogger, described, open_logger
from tests.conftest import run_python
from tests.settings.test_config import composed

GROUP = "table6-1a2b3c4d"


def offline_runs(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the records of each run, as wandb's own command prints them."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        printed = run_python("-m", "wandb", "leet", "inspect", str(file), "--json")
        assert printed.returncode == 0, printed.stderr
        found.append([json.loads(line) for line in printed.stdout.splitlines()])
    return found


def rows(of_run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in of_run if "history" in record]


def header(of_run: list[dict[str, Any]]) -> dict[str, Any]:
    return next(dict(record["run"]) for record in of_run if "run" in record)


def numbers_of(metrics: dict[str, Any]) -> dict[str, float]:
    values = flat_metrics(metrics)
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def run_with(logger: str, folder: Path, *words: str) -> tuple[dict[str, Any], Path]:
    settings = (
        "model=tiny-random",
        "permutation.epochs=3",
        f"runs_dir={folder}",
        f"logger={logger}",
    )
    result = job.run(read_config(composed(*settings, *words)))
    assert result is not None
    return result.metrics, result.directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """Give metrics and directory of a finished run that W&B has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("PERMLLM_SWEEP", GROUP)
        yield run_with("wandb", tmp_path_factory.mktemp("runs"))


def test_wandb_has_the_curves_and_final_numbers(finished: tuple[dict[str, Any], Path]) -> None:
    metrics, directory = finished
    (of_run,) = offline_runs(directory.parent)
    head = header(of_run)
    assert (head["project"], head["job_type"], head["run_group"]) == ("permllm", "learn", GROUP)
    assert head["tags"] == ["wanda", "lcp", "2:4", "tiny-random"]
    config = head["config"]["update"]
    assert (directory / WANDB_ID).read_text().strip() == head["run_id"]
    assert config["record.run_directory"] == str(directory)
    assert config["record.config_hash"] == metrics["config_hash"]
    assert (config["block_size"], config["permutation.epochs"]) == (64, 3)
    assert not any("_target_" in key for key in config if not key.startswith("record."))
    assert "logger" not in config
    steps = [row for row in rows(of_run) if "permutation/loss" in row]
    assert [row["_step"] for row in steps] == list(range(len(steps)))
    names = {f"permutation/{name}" for name in ("loss", "temperature", "flips", "step_seconds")}
    assert all(names <= set(row) for row in steps)
    epochs = [row for row in rows(of_run) if "epoch/permutation/loss" in row]
    for row, entry in zip(epochs, read_lines(directory / "history.jsonl"), strict=True):
        assert entry.pop("group") == "permutation"
        del entry["epoch"], entry["first_layer"], entry["last_layer"]  # they make no curve
        known = {key: value for key, value in entry.items() if value is not None}
        measured = {f"epoch/permutation/{key}": value for key, value in known.items()}
        assert {key: row[key] for key in row if key.startswith("epoch/")} == measured
    places = [row["_step"] for row in rows(of_run)]
    assert places == sorted(set(places))
    updates = [one["summary"]["update"] for one in of_run if "update" in one.get("summary", {})]
    (final,) = (update for update in updates if "record/status" in update)
    assert final.items() >= numbers_of(metrics).items()
    assert of_run[-1]["exit"].get("exit_code", 0) == 0


def test_a_summary_begins_with_what_a_person_wants() -> None:
    figures = flat_metrics(
        {
            "perplexity": {"dense": {"a": {"value": 4.0}}, "sparse": {"a": {"value": 8.0}}},
            "tasks": {"sparse": {"rte": {"metrics": {"acc,none": 0.5}, "n": 9, "asked": "rte"}}},
            "evaluation": {"perplexity": {"seqlen": 64}},
            "sha256": {"x": "y"},
            "retained_saliency": {"a": 0.5, "b": 0.7},
            "output_error": {"a": 0.25},
            "moved_channels": {"a": 0.5},
            "seconds": {"permute": 90.0},
            "peak_memory_bytes": 3 * 10**9,
            "sparsity": {"pattern": "2:4", "patterns": {"a.b": "dense"}},
        }
    )
    assert figures.pop("record/retained_saliency/mean") == pytest.approx(0.6)
    shown = [key for key in figures if not key.startswith("record/")]
    assert shown == ["perplexity/a", "nats_above_dense", "accuracy", "minutes", "peak_memory_gb"]
    assert [figures.pop(key) for key in shown] == [8.0, pytest.approx(math.log(2)), 0.5, 1.5, 3.0]
    names = ["moved_channels/mean", "output_error/mean", "perplexity/dense/a/value"]
    names += ["seconds/permute", "sparsity/pattern", "tasks/sparse/rte/metrics/acc,none"]
    names += ["tasks/sparse/rte/n", "tasks/sparse/rte/asked"]
    assert sorted(figures) == sorted(f"record/{name}" for name in names)


@contextmanager
def attempt(folder: Path, *overrides: str) -> Iterator[RunLogger]:
    """Open the logger of a job in `folder`/run."""
    config = read_config(
        composed("model=tiny-random", "logger=wandb", f"runs_dir={folder}", *overrides)
    )
    with open_logger(config, folder / "run", True) as logger:
        yield logger


@pytest.mark.parametrize(
    ("login", "variable", "modes"),
    [
        (False, None, []),
        (True, None, ["online"]),
        (AuthenticationError("no answer"), None, ["offline"]),
        (False, "offline", ["offline"]),
        (True, "disabled", []),
        # Its server refuses, which costs no run its result.
        (False, "online", ["online", "offline"]),
    ],
)
def test_the_default_is_wandb_where_a_key_is_configured_or_its_mode_is_said(
    login: bool | Exception,
    variable: str | None,
    modes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [AuthenticationError("no answer")] * (len(modes) - 1) + [MagicMock()]
    init = Mock(side_effect=answers)
    effect = {"side_effect" if isinstance(login, Exception) else "return_value": login}
    monkeypatch.setattr("wandb.login", Mock(**effect))
    monkeypatch.setattr("wandb.init", init)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with attempt(tmp_path, "logger=auto"):
        pass
    assert [call.kwargs["mode"] for call in init.call_args_list] == modes


def test_a_resumed_run_is_the_same_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with suppress(KeyboardInterrupt), attempt(tmp_path) as logger:
        for step in range(3):
            logger.log("mask", {"loss": 2.0 - step}, step)
            if step == 1:
                line = {"group": "mask", "epoch": 1, "loss": 1.5, "measured_loss": None}
                logger.log_epoch(line, 1)
        raise KeyboardInterrupt
    time.sleep(1.1)  # folders are named by the second
    with attempt(tmp_path) as logger:
        for step in range(2, 4):
            logger.log("mask", {"loss": 2.0 - step / 2}, step)
        line = {"group": "mask", "epoch": 2, "loss": 0.75, "measured_loss": 0.5}
        logger.log_epoch(line, 2)
        logger.summary({"status": "finished"})
    of_runs = offline_runs(tmp_path)
    number = (tmp_path / "run" / WANDB_ID).read_text().strip()
    assert [header(of_run)["run_id"] for of_run in of_runs] == [number, number]
    assert all(header(of_run)["resume"] for of_run in of_runs)
    assert [of_run[-1]["exit"].get("exit_code", 0) for of_run in of_runs] == [1, 0]
    # A step that was done again has the number that it had: W&B keeps one of the two.
    steps = [[row["_step"] for row in rows(of_run)] for of_run in of_runs]
    assert steps == [[0, 1, 2], [2, 3]]
    losses = [[row.get("epoch/mask/loss") for row in rows(of_run)] for of_run in of_runs]
    assert losses == [[None, 1.5, None], [None, 0.75]]


def test_rows_that_wandb_has_are_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock(starting_step=2)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.init", Mock(return_value=run))
    with attempt(tmp_path) as logger:
        for step in range(4):
            logger.log("mask", {"loss": 1.0}, step)
            if step % 2:
                logger.log_epoch({"group": "mask", "loss": 1.0}, step // 2 + 1)
    assert [call.kwargs["step"] for call in run.log.call_args_list] == [2, 3, 3]


def test_names_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [["model=tiny-random"], ["model=tiny-random", "logger.group=mine"]]
    single, asked = (read_config(composed(*words)) for words in settings)
    monkeypatch.delenv("PERMLLM_SWEEP", raising=False)
    assert described(single, Path("y"), False)["group"] is None
    monkeypatch.setenv("PERMLLM_SWEEP", GROUP)
    assert [described(one, Path("y"), False)["group"] for one in (single, asked)] == [GROUP, "mine"]
    words = "experiment=table6 +logger.group=x logger=wandb runs_dir=a run_dir=b ++force=true"
    deploy = described(read_config(composed("model=tiny-random", "method=deploy")), Path("y"), True)
    tags = ["sparsegpt", "sensitive", "heuristic", "distill", "2:4", "tiny-random"]
    assert [*deploy["tags"].values()] == tags
    for typed, name in (
        ([*words.split(), "block_size=32", "~x"], "block_size=32 ~x"),
        (words.split(), "y"),
        (["a" * 200], "a" * 128),
    ):
        monkeypatch.setattr("permllm.store.sweep.overrides", lambda typed=typed: typed)
        assert described(single, Path("runs/y"), False)["name"] == name


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's curves of a run."""
    accumulators = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def hparams(directory: Path) -> dict[str, Any]:
    """Return the settings that TensorBoard has of a run."""
    events_of = import_module("tensorboard.backend.event_processing.event_accumulator")
    plugin = import_module("tensorboard.plugins.hparams.plugin_data_pb2")
    settings: dict[str, Any] = {}
    for file in (directory / "tensorboard").glob("events*"):
        events = events_of.EventAccumulator(str(file))
        events.Reload()
        for metadata in events.summary_metadata.values():
            data = plugin.HParamsPluginData.FromString(metadata.plugin_data.content)
            for key, value in data.session_start_info.hparams.items():
                settings[key] = getattr(value, value.WhichOneof("kind"))
    return settings


def test_force_is_a_new_run_for_the_loggers(
    finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    directory = tmp_path / finished[1].name
    (directory / "tensorboard").mkdir(parents=True)
    for name in (WANDB_ID, "tensorboard/events", "config.yaml"):
        text = (finished[1] / name).read_text() if name != "tensorboard/events" else ""
        (directory / name).write_text(text)
    metrics, _ = run_with("tensorboard", tmp_path, "force=true")
    assert not (directory / WANDB_ID).exists()
    assert not (directory / "tensorboard" / "events").exists()
    found = scalars(directory)
    assert [step for step, _ in found["epoch/permutation/loss"]] == [1, 2, 3]
    shown = {key for key in numbers_of(metrics) if not key.startswith("record/")}
    curves = {"permutation/loss", "permutation/temperature"}
    assert shown | curves <= found.keys()
    assert not [key for key in found if key.startswith("record/")]
    settings = hparams(directory)
    assert (settings["block_size"], settings["pruner.name"], settings["seed"]) == (64, "wanda", 0)
    assert read_json(directory / "metrics.json")["status"] == "finished"


def test_a_logger_whose_package_is_not_there_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="logger=tens"), attempt(tmp_path, "logger=tensorboard"):
        pass


def test_a_logger_that_fails_costs_the_curves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = "torch.utils.tensorboard.SummaryWriter.add_scalar"
    with attempt(tmp_path, "logger=tensorboard") as logger:
        logger.log("mask", {"loss": 1.0}, 0)
        monkeypatch.setattr(writer, lambda *_, **__: 1 / 0)
        for step in range(1, 4):
            logger.log("mask", {"loss": 1.0}, step)
    assert caplog.text.count("the logger fails (division by zero)") == 1
