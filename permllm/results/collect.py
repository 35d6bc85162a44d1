"""Find the runs below some directories, and say of everything else why it is not one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from permllm.config import identity_of
from permllm.errors import ConfigError
from permllm.results.record import CONFIG, ENVIRONMENT, HISTORY, METRICS, SCHEMA_VERSION
from permllm.sweep import kept


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: where it lies.
        config: resolved.
        metrics: as in `metrics.json`.
        environment: as in `environment.json`; empty where there is none.
        history: one entry a pass of learning.
    """

    directory: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass
class Collection:
    """What lies below some directories.

    Attributes:
        runs: finished, each identity once.
        duplicates: runs of an identity that is there already, and the directory of the first.
        skipped: what looked like a run and is none, and why.
    """

    runs: list[Run] = field(default_factory=list)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What a reader of the runs must know about the rest."""
        notes = [f"{path} has the same identity as {first} and is not counted again" for path, first in self.duplicates]
        return notes + [f"skipped {path}: {reason}" for path, reason in self.skipped]


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
    first: dict[str, Path] = {}
    for file in files:
        try:
            run = _read(file.parent)
        except ValueError as error:
            found.skipped.append((file, str(error)))
            continue
        identity = json.dumps(identity_of(run.config), sort_keys=True)
        if identity in first:
            found.duplicates.append((run.directory, first[identity]))
        else:
            first[identity] = run.directory
            found.runs.append(run)
    return found


def _read(directory: Path) -> Run:
    metrics = _json(directory / METRICS)
    if metrics.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {metrics.get('schema_version')!r}, expected {SCHEMA_VERSION}: not a run of ours")
    if metrics.get("status") != "finished":
        raise ValueError(f"not finished (status {metrics.get('status')!r}); the same command continues it")
    if "study" in metrics:
        raise ValueError("a study, not a run: what it found stands in it, under `study`")
    for key in ("name", "config_hash", "seconds", "sparsity"):
        if key not in metrics:
            raise ValueError(f"{key} is missing")
    try:
        config = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG} beside it cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or "permutation" not in config:
        raise ValueError(f"{CONFIG} beside it is not the config of a run")
    environment = _json(directory / ENVIRONMENT) if (directory / ENVIRONMENT).is_file() else {}
    return Run(directory, config, metrics, environment, _history(directory / HISTORY))


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _history(file: Path) -> list[dict[str, Any]]:
    """The lines that can be read; the last one may have been cut short."""
    entries = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries
