"""Finished runs below some folders and in files of kept records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permllm.config import flatten, identity_of
from permllm.errors import ConfigError, DataError, first_line
from permllm.runs.files import read_json, read_yaml
from permllm.runs.measures import Key, Measure, measured
from permllm.runs.names import CONFIG, ENVIRONMENT, EVALUATIONS, HISTORY, LINES, METRICS, RECORDS, SCHEMA_VERSION

# `metrics.json` has a copy of these keys of the evaluation that was asked for last.
COPIED = ("evaluation", "evaluation_hash", "perplexity", "tasks", "evaluated_texts")

# Settings of a run that change no number.
_NO_SETTING = ("name", "save_weights")


@dataclass
class Run:
    """A finished run.

    Attributes:
        directory: of the run; of a kept record its name below the file.
        config: resolved settings.
        metrics: of `metrics.json`.
        evaluations: all of the run, the one of `metrics.json` first.
        environment: of `environment.json`; empty where there is none.
        history: an entry an epoch of learning.
        identity: settings that make the pruned model, flat.
        sparse: measures of the pruned model.
        dense: measures of the dense model.
    """

    directory: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluations: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    identity: dict[str, Any] = field(init=False)
    sparse: dict[Key, Measure] = field(init=False)
    dense: dict[Key, Measure] = field(init=False)

    def __post_init__(self) -> None:
        """Take the measures. Raises DataError, which begins with the directory, where the record lacks what tables need."""
        config, metrics = self.config, self.metrics
        try:
            if (version := metrics["schema_version"]) != SCHEMA_VERSION:
                raise DataError(f"{self.directory}: schema_version={version}: expected {SCHEMA_VERSION}")
            if (status := metrics["status"]) != "finished":
                raise DataError(f"{self.directory}: not finished (status {status!r}); the same command continues it")
            (
                int(config["seed"]),
                float(metrics["peak_memory_bytes"]),
                config["sparsity"],
                config["calibration"].get("statistics"),
            )
            model, _, _ = (str(config[group]["name"]) for group in ("model", "pruner", "permutation"))
            self.identity = {k: value for k, value in flatten(identity_of(config)).items() if k not in _NO_SETTING}
            self.sparse, self.dense = (measured(metrics, self.evaluations, model, which) for which in ("sparse", "dense"))
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            missing = " is missing" if isinstance(error, KeyError) else ""
            raise DataError(f"{self.directory}: not as a run leaves it: {first_line(error)}{missing}") from error


@dataclass
class Collection:
    """Runs that were found.

    Attributes:
        runs: finished, each identity once.
        notes: a line for everything else that looked like a run.
    """

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(places: Iterable[Path], apart: bool = False) -> Collection:
    """Return every finished run below some folders and in files of kept records, in the order of their paths.

    Below the folder of a sweep those are the runs of its jobs. A file named `records.jsonl` is found below a folder; a file
    of another name is read where it is given.

    Args:
        places: folders and files.
        apart: return also runs whose identity another run has.

    Raises:
        ConfigError: a place does not exist, or nothing in any place looks like a run.
    """
    from permllm.runs.sweep import kept  # imports Hydra

    places = list(places)
    for place in places:
        if not place.is_dir() and not (place.suffix == LINES and place.is_file()):
            raise ConfigError(f"{place} is not a directory, nor a file of records such as {RECORDS}")
    found = Collection()
    folders = [place for place in places if place.is_dir()]
    for job in [job for place in folders for job in kept(place)]:
        if job.directory and Path(job.directory).is_dir():
            folders.append(Path(job.directory))
        else:
            reason = "its directory is gone" if job.directory else job.reason
            found.notes.append(f"skipped {job.directory or 'a job'}: {' '.join(job.overrides)}: {reason}")
    files = {place for place in places if place.is_file()} | {file for folder in folders for file in _files(folder)}
    if not files:
        below = ", ".join(map(str, places))
        raise ConfigError(f"no runs below {below}: a run is a directory with a {METRICS}, as `python run.py` leaves it")
    first: dict[str, Run] = {}
    for run in _runs(sorted(files)):
        if isinstance(run, DataError):
            found.notes.append(f"skipped {run}")
            continue
        there = first.setdefault(json.dumps(run.identity, sort_keys=True, default=str), run)
        if there is run or apart:
            found.runs.append(run)
        else:
            found.notes.append(f"{run.directory} has the same settings as {there.directory} and is not counted again")
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path, _, files in os.walk(folder):
        yield from (Path(path) / name for name in (METRICS, RECORDS) if name in files)


def _runs(files: Iterable[Path]) -> Iterator[Run | DataError]:
    for file in files:
        if file.name == METRICS:
            yield _tried(file.parent, _of_directory, file.parent)
            continue
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            yield DataError(f"{file} cannot be read: {first_line(error)}")
            continue
        for number, line in enumerate(lines, 1):
            yield _tried(Path(f"{file}, line {number}"), _of_line, file, line)


def _tried(where: Path, read: Any, *arguments: Any) -> Run | DataError:
    try:
        found: Run = read(*arguments)
        return found
    except DataError as error:
        return error
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, OSError) as error:
        return DataError(f"{where}: not as a run leaves it: {first_line(error)}")


def _of_directory(directory: Path) -> Run:
    metrics = read_json(directory / METRICS)
    files = [read_json(file) for file in sorted((directory / EVALUATIONS).glob("*.json"))]
    evaluations = sorted(files, key=lambda one: one["evaluation_hash"] != metrics.get("evaluation_hash"))
    environment = read_json(directory / ENVIRONMENT) if (directory / ENVIRONMENT).exists() else {}
    config = read_yaml(directory / CONFIG)
    return Run(directory, config, metrics, evaluations or copied(metrics), environment, list(_history(directory / HISTORY)))


def copied(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluation that `metrics.json` holds a copy of, without scores."""
    return [{key: metrics[key] for key in COPIED if key in metrics}] if "evaluation" in metrics else []


def _history(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield dict(json.loads(line))
        except ValueError:  # cut short by the end of a process
            continue


def _of_line(file: Path, text: str) -> Run:
    line = json.loads(text)
    rest = (line.get("evaluations", []), line.get("environment", {}), line.get("history", []))
    return Run(file / line["run"], line["config"], line["metrics"], *rest)
