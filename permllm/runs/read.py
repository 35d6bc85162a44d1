"""Finished runs below some folders and in files of kept records, which hold a run a line."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permllm.config import flatten, identity_of
from permllm.errors import ConfigError, DataError, first_line
from permllm.runs.files import read_json, read_lines, read_yaml, write_text
from permllm.runs.measures import Key, Measure, measured, plain
from permllm.runs.names import (
    CONFIG,
    COPIED,
    ENVIRONMENT,
    EVALUATIONS,
    HISTORY,
    LINES,
    METRICS,
    RECORDS,
    SCHEMA_VERSION,
)

# Settings of a run that change no number.
_NO_SETTING = ("name", "save_weights")
# A folder of the machine, which no result depends on: named from the root, of whichever system.
_ABSOLUTE = r"['\"]*(/|\\\\|[A-Za-z]:[/\\])"


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
        """Take the measures.

        Raises DataError, which begins with the directory, where the record lacks what tables need.
        """
        config, metrics = self.config, self.metrics
        with _checked(self.directory):
            if (version := metrics["schema_version"]) != SCHEMA_VERSION:
                raise DataError(
                    f"{self.directory}: schema_version={version}: expected {SCHEMA_VERSION}"
                )
            if (status := metrics["status"]) != "finished":
                raise DataError(
                    f"{self.directory}: not finished (status {status!r}); the same command continues it"
                )
            int(config["seed"]), float(metrics["peak_memory_bytes"]), config["sparsity"]
            model, _, _ = (
                str(config[group]["name"]) for group in ("model", "pruner", "permutation")
            )
            self.identity = {
                k: value
                for k, value in flatten(identity_of(config)).items()
                if k not in _NO_SETTING
            }
            self.sparse, self.dense = (
                measured(metrics, self.evaluations, model, which) for which in ("sparse", "dense")
            )

    def key(self, *spared: str) -> str:
        """Return the identity, without some settings, as a text that runs of equal settings share."""
        return json.dumps(
            {k: value for k, value in self.identity.items() if k not in spared},
            sort_keys=True,
            default=str,
        )

    def settings(self) -> dict[str, Any]:
        """Return all settings that make a result but the seed, by their names on the command line."""
        flat = {
            plain(key.removesuffix(".name")): value
            for key, value in self.identity.items()
            if key != "seed"
        }
        digests = {
            key.removeprefix("inputs."): digest
            for key, digest in flat.items()
            if key.startswith("inputs.") and digest
        }
        return flat | {f"{key} (digest)": digest[:8] for key, digest in digests.items()}


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

    Below the folder of a sweep those are the runs of its jobs. A file named `records.jsonl` is
    found below a folder; a file of another name is read where it is given.

    Args:
        places: folders and files.
        apart: return also runs whose identity another run has.

    Raises:
        ConfigError: a place does not exist, or no place holds a finished run.
    """
    from permllm.runs.sweep import kept  # imports Hydra

    places = list(places)
    for place in places:
        if not place.is_dir() and not (place.suffix == LINES and place.is_file()):
            raise ConfigError(
                f"{place} is not a directory, nor a file of records such as {RECORDS}"
            )
    found = Collection()
    folders = [place for place in places if place.is_dir()]
    for job in [job for place in folders for job in kept(place)]:
        if job.directory and Path(job.directory).is_dir():
            folders.append(Path(job.directory))
        else:
            reason = "its directory is gone" if job.directory else job.reason
            found.notes.append(
                f"skipped {job.directory or 'a job'}: {' '.join(job.overrides)}: {reason}"
            )
    files = {place for place in places if place.is_file()}
    files |= {
        file for folder in folders for name in (METRICS, RECORDS) for file in folder.rglob(name)
    }
    if not files:
        below = ", ".join(map(str, places))
        raise ConfigError(
            f"no runs below {below}: a run is a directory with a {METRICS}, as `python run.py` leaves it"
        )
    first: dict[str, Run] = {}
    for run in (run for file in sorted(files) for run in _runs(file, found.notes)):
        there = first.setdefault(run.key(), run)
        if there is run or apart:
            found.runs.append(run)
        else:
            found.notes.append(
                f"{run.directory} has the same settings as {there.directory} and is not counted again"
            )
    if not found.runs:
        raise ConfigError("; ".join(["no finished run is among them", *found.notes]))
    return found


def _runs(file: Path, notes: list[str]) -> Iterator[Run]:
    """Give the finished runs of a file; `notes` get a line for each other one."""
    lines = {
        Path(f"{file}, line {number}"): line
        for number, line in enumerate(file.read_bytes().splitlines(), 1)
    }
    for where, line in ({file.parent: None} if file.name == METRICS else lines).items():
        try:
            with _checked(where):
                yield _of_directory(where) if line is None else _of_line(file, line)
        except DataError as error:
            notes.append(f"skipped {error}")


@contextmanager
def _checked(where: Path) -> Iterator[None]:
    """Turn what a record lacks into a DataError that begins with its place."""
    try:
        yield
    except (
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        OSError,
    ) as error:
        missing = " is missing" if isinstance(error, KeyError) else ""
        raise DataError(f"{where}: not as a run leaves it: {first_line(error)}{missing}") from error


def _of_directory(directory: Path) -> Run:
    metrics = read_json(directory / METRICS)
    files = [read_json(file) for file in sorted((directory / EVALUATIONS).glob("*.json"))]
    evaluations = sorted(
        files, key=lambda one: one["evaluation_hash"] != metrics.get("evaluation_hash")
    )
    environment = read_json(directory / ENVIRONMENT) if (directory / ENVIRONMENT).exists() else {}
    config, history = read_yaml(directory / CONFIG), read_lines(directory / HISTORY)
    return Run(directory, config, metrics, evaluations or copied(metrics), environment, history)


def copied(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluation that `metrics.json` holds a copy of, without scores."""
    return (
        [{key: metrics[key] for key in COPIED if key in metrics}] if "evaluation" in metrics else []
    )


def _of_line(file: Path, text: bytes) -> Run:
    line = json.loads(text)
    rest = (line.get("evaluations", []), line.get("environment", {}), line.get("history", []))
    return Run(file / line["run"], line["config"], line["metrics"], *rest)


def keep_runs(places: Iterable[Path], file: Path) -> list[str]:
    """Write the runs in some places to a file, a line each, without paths of the machine; return their names.

    The file, which is replaced, has what tables and documents are made from, without weights,
    permutations and masks.

    Raises:
        ConfigError: the file has another suffix, a run cannot be kept, two have one name, or there
            is none.
    """
    found = collect(places, apart=True)
    # An absolute path has a name also where the place is ".".
    names = [Path(os.path.abspath(run.directory)).name for run in found.runs]
    wrong = [] if file.suffix == LINES else [f"expected a file whose name ends in {LINES}"]
    wrong += found.notes
    wrong += [
        f"{count} of the runs have the name {name}"
        for name, count in Counter(names).items()
        if count > 1
    ]
    if wrong:
        raise ConfigError(f"--jsonl {file}: {wrong[0]}")
    runs = sorted(zip(names, found.runs, strict=True), key=lambda one: one[0])
    write_text(file, "".join(json.dumps({"run": name} | _line(run)) + "\n" for name, run in runs))
    return sorted(names)


def _line(run: Run) -> dict[str, Any]:
    config, environment = dict(run.config), dict(run.environment)
    paths = {
        key: value
        for key, value in (config.get("paths") or {}).items()
        if not re.match(_ABSOLUTE, str(value))
    }
    config |= {
        key: None for key in ("runs_dir", "run_dir") if re.match(_ABSOLUTE, str(config.get(key)))
    }
    config |= {"paths": paths} if config.get("paths") else {}
    if "command" in environment:
        words = [
            word
            for word in environment["command"].split()
            if not re.match(rf"[\w.]*_?dir={_ABSOLUTE}", word)
        ]
        environment["command"] = " ".join(words)
    line = {"config": config, "metrics": run.metrics, "evaluations": run.evaluations}
    return line | {
        key: value
        for key, value in (("environment", environment), ("history", run.history))
        if value
    }
