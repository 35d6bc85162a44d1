"""Find the runs below some directories, and say of everything else why it is not one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError, DataError
from permllm.identity import identity_of
from permllm.record import evaluations
from permllm.record.files import file_checksum, has_checksum, read_json, read_json_lines, read_yaml
from permllm.record.names import CONFIG, ENVIRONMENT, HISTORY, METRICS, SCHEMA_VERSION, SCORES
from permllm.record.outcomes import kept
from permllm.record.schema import Environment, FinishedRun, Pass, RecordHead, Scores, Settings, validated


@dataclass(frozen=True)
class Run:
    """A finished run, as `permllm.record.schema` describes its files.

    Attributes:
        directory: where it lies.
        config: resolved (`Settings`).
        metrics: as in `metrics.json` (`FinishedRun`).
        environment: as in `environment.json` (`Environment`); empty where there is none.
        history: one entry a pass of learning (`Pass`).
        scores: what the results of each evaluation are made of (`EvaluationScores`), by the digest of the evaluation; runs of
            earlier versions have none.
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
        duplicates: runs of an identity that is there already, evaluated in the same way, and the directory of the first.
        skipped: what looked like a run and is none, and why.
        older: how many of the runs are older than checksums.
    """

    runs: list[Run] = field(default_factory=list)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    older: int = 0

    def left_out(self) -> list[str]:
        """A line for each of the rest."""
        notes = [f"{path} has the same identity as {first} and is not counted again" for path, first in self.duplicates]
        return notes + [f"skipped {path}: {reason}" for path, reason in self.skipped]

    def notes(self) -> list[str]:
        """What a reader of the runs must know about them and the rest."""
        number = f"{self.older} record{' is' if self.older == 1 else 's are'}"
        return self.left_out() + [f"{number} older than checksums: checked by their form alone"] * bool(self.older)


def collect(directories: Iterable[Path]) -> Collection:
    """Every run below the directories, in the order of their paths; below a sweep's folder, the runs of its jobs.

    Raises:
        ConfigError: a directory does not exist, or nothing below them has a `metrics.json`.
    """
    directories = list(directories)
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory")
    jobs = [(directory, job) for directory in directories for job in kept(directory)]
    places = directories + [Path(job.directory) for _, job in jobs if job.directory]
    files = sorted({file for place in places for file in place.rglob(METRICS)})
    if not files:
        below = ", ".join(map(str, directories))
        raise ConfigError(f"no runs below {below}: a run is a directory with a {METRICS}, as `python run.py` leaves it")
    found = Collection()
    found.skipped += [(directory, f"{' '.join(job.overrides)}: {job.reason}") for directory, job in jobs if not job.directory]
    first: dict[str, Run] = {}
    for file in files:
        try:
            run = _read(file.parent, found)
        except DataError as error:
            found.skipped.append((file.parent, str(error).replace(f"{file.parent}/", "")))
            continue
        identity = json.dumps(identity_of(run.config), sort_keys=True)
        there = first.setdefault(identity, run)
        if there is run:
            found.runs.append(run)
            found.older += not has_checksum(file)
        elif not _merged(there, run):
            found.duplicates.append((run.directory, there.directory))
    return found


def _merged(there: Run, run: Run) -> bool:
    """Whether a run of the same pruned model was evaluated in another way, which is one run's now and was another's once."""
    same = all(there.metrics[key] == run.metrics[key] for key in ("sparsity", "retained_saliency", "output_error"))
    if not same or not evaluations.merge(there.metrics, there.config, evaluations.all_of(run.metrics, run.config)):
        return False
    there.scores.update({digest: scores for digest, scores in run.scores.items() if digest not in there.scores})
    for stage, seconds in run.metrics["seconds"].items():
        if stage.startswith("evaluate"):
            there.metrics["seconds"][stage] = there.metrics["seconds"].get(stage, 0.0) + seconds
    return True


def _read(directory: Path, found: Collection) -> Run:
    file = directory / METRICS
    metrics = read_json(file, RecordHead)
    version, status = metrics["schema_version"], metrics["status"]
    if version != SCHEMA_VERSION:
        raise DataError(f"{file}: schema_version is {version}, expected {SCHEMA_VERSION}: not a run of ours")
    if status != "finished":
        raise DataError(f"not finished (status {status!r}); the same command continues it")
    if "study" in metrics:
        raise DataError("a study, not a run: what it found stands in it, under `study`")
    finished: dict[str, Any] = dict(validated(str(file), metrics, FinishedRun))
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
