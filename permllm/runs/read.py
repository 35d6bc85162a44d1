"""Find the runs below some directories, and say of everything else why it is not one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from permllm.config import identity_of
from permllm.errors import ConfigError, DataError
from permllm.runs import evaluations
from permllm.runs.files import file_checksum, read_json, read_json_lines, read_record_lines, read_yaml
from permllm.runs.names import CONFIG, ENVIRONMENT, HISTORY, LINES, METRICS, RECORDS, SCHEMA_VERSION, SCORES
from permllm.runs.outcomes import kept
from permllm.runs.schema import (
    Environment,
    FinishedRun,
    KeptRecord,
    Object,
    Pass,
    RecordHead,
    Scores,
    Settings,
    validated,
)


@dataclass(frozen=True)
class Run:
    """A finished run, as `permllm.runs.schema` describes its files.

    Attributes:
        directory: where it lies; of a kept one its name below the file of the records.
        config: resolved (`Settings`).
        metrics: as in `metrics.json` (`FinishedRun`).
        environment: as in `environment.json` (`Environment`); empty where there is none.
        history: one entry an epoch of learning (`Pass`).
        scores: what the results of each evaluation are made of (`EvaluationScores`), by the digest of the evaluation.
    """

    directory: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Collection:
    """What lies below some directories.

    Attributes:
        runs: finished, each identity once, with the evaluations of all runs of that identity.
        duplicates: runs of an identity that is there already, evaluated in the same way or pruned to other numbers, as on
            another machine, and the directory of the first.
        evaluated_otherwise: of these, those with an evaluation that the first does not have.
        skipped: what looked like a run and is none, and why.
    """

    runs: list[Run] = field(default_factory=list)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)
    evaluated_otherwise: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """A line for each of the rest."""
        notes = []
        for path, first in self.duplicates:
            lost = ", nor what else it was evaluated on, as its numbers are others" if path in self.evaluated_otherwise else ""
            notes.append(f"{path} has the same identity as {first} and is not counted again{lost}")
        return notes + [f"skipped {path}: {reason}" for path, reason in self.skipped]


def collect(places: Iterable[Path], apart: bool = False) -> Collection:
    """Every run below some folders, and in files of kept records, in the order of their paths.

    Below a sweep's folder those are the runs of its jobs. A file named `records.jsonl` is found below a folder, one of another
    name is read where it is given.

    Args:
        places: folders and files.
        apart: give each run as it lies there, also where another one has its identity.

    Raises:
        ConfigError: a place does not exist, or there is nothing like a run in any of them.
    """
    places = list(places)
    for place in places:
        if not place.is_dir() and not (place.suffix == LINES and place.is_file()):
            raise ConfigError(f"{place} is not a directory, nor a file of records such as {RECORDS}")
    jobs = [(place, job) for place in places if place.is_dir() for job in kept(place)]
    folders = [place for place in places if place.is_dir()] + [Path(job.directory) for _, job in jobs if job.directory]
    files = {file for folder in folders for file in _named(folder, METRICS, RECORDS)}
    files |= {place for place in places if place.is_file()}
    if not files:
        below = ", ".join(map(str, places))
        raise ConfigError(f"no runs below {below}: a run is a directory with a {METRICS}, as `python run.py` leaves it")
    found = Collection()
    found.skipped += [(directory, f"{' '.join(job.overrides)}: {job.reason}") for directory, job in jobs if not job.directory]
    gone = [(Path(job.directory), job) for _, job in jobs if job.directory and not Path(job.directory).is_dir()]
    found.skipped += [(folder, f"{' '.join(job.overrides)}: its directory is gone") for folder, job in gone]
    first: dict[str, Run] = {}
    for where, read in _entries(sorted(files)):
        try:
            run = read(found)
        except DataError as error:
            reason = str(error).replace(f"{where}/", "").removeprefix(f"{where}: ").removeprefix(f"{where} ")
            found.skipped.append((where, reason))
            continue
        identity = json.dumps(identity_of(run.config), sort_keys=True)
        there = first.setdefault(identity, run)
        if there is run or apart:
            found.runs.append(run)
        elif not _merged(there, run):
            found.duplicates.append((run.directory, there.directory))
            if evaluations.not_held(there.metrics, evaluations.all_of(run.metrics)):
                found.evaluated_otherwise.append(run.directory)
    return found


def _named(folder: Path, *names: str) -> Iterator[Path]:
    """Everything of these names below a folder, in which jobs may be at work: what goes while it is looked at is left out."""
    for path, folders, files in os.walk(folder):
        yield from (Path(path) / name for name in names if name in files or name in folders)


def _entries(files: Iterable[Path]) -> Iterator[tuple[Path, Callable[[Collection], Run]]]:
    """Of each run its place, and how it is read."""
    for file in files:
        if file.name == METRICS:
            yield file.parent, partial(_read_directory, file.parent)
            continue
        try:
            for where, line in read_record_lines(file, KeptRecord):
                yield Path(where), partial(_read_line, file, where, line)
        except DataError as error:
            yield file, partial(_raise, error)


def _raise(error: DataError, _: Collection) -> Run:
    raise error


def _merged(there: Run, run: Run) -> bool:
    """Whether a run of the same pruned model was evaluated in another way, which is one run's now and was another's once."""
    same = all(there.metrics[key] == run.metrics[key] for key in ("sparsity", "retained_saliency", "output_error"))
    if not same or not evaluations.merge(there.metrics, evaluations.all_of(run.metrics)):
        return False
    there.scores.update({digest: scores for digest, scores in run.scores.items() if digest not in there.scores})
    for stage, seconds in run.metrics["seconds"].items():
        if stage.startswith("evaluate"):
            there.metrics["seconds"][stage] = there.metrics["seconds"].get(stage, 0.0) + seconds
    return True


def _finished(where: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a finished run."""
    head = validated(where, metrics, RecordHead)
    version, status = head["schema_version"], head["status"]
    if version != SCHEMA_VERSION:
        raise DataError(f"{where}: schema_version is {version}, expected {SCHEMA_VERSION}: not a run of ours")
    if status != "finished":
        raise DataError(f"not finished (status {status!r}); the same command continues it")
    return dict(validated(where, metrics, FinishedRun))


def _read_directory(directory: Path, found: Collection) -> Run:
    file = directory / METRICS
    finished = _finished(str(file), read_json(file, Object))
    for name, stated in finished.get("files", {}).items():
        if file_checksum(directory / name) != stated:
            raise DataError(f"{directory / name} is corrupt: it is not what the run left")
    config = read_yaml(directory / CONFIG, Settings)
    environment: dict[str, Any] = {}
    if (directory / ENVIRONMENT).exists():
        environment = dict(read_json(directory / ENVIRONMENT, Environment))
    history = read_json_lines(directory / HISTORY, Pass) if (directory / HISTORY).exists() else []
    scores: dict[str, Any] = {}
    if (directory / SCORES).exists():
        try:
            scores = dict(read_json(directory / SCORES, Scores)["evaluations"])
        except DataError as error:  # what pairs need, and nothing else
            found.skipped.append((directory / SCORES, str(error).removeprefix(f"{directory / SCORES} ")))
    return Run(directory, dict(config), finished, environment, [dict(entry) for entry in history], scores)


def _read_line(file: Path, where: str, line: KeptRecord | DataError, _: Collection) -> Run:
    if isinstance(line, DataError):
        raise line
    finished = _finished(f"{where}: metrics", line["metrics"])
    config = validated(f"{where}: config", line["config"], Settings)
    environment: dict[str, Any] = {}
    if line.get("environment"):
        environment = dict(validated(f"{where}: environment", line["environment"], Environment))
    history = validated(f"{where}: history", line.get("history", []), list[Pass])
    scores = validated(f"{where}: scores", line["scores"], Scores)["evaluations"] if "scores" in line else {}
    return Run(file / line["run"], dict(config), finished, environment, [dict(entry) for entry in history], dict(scores))
