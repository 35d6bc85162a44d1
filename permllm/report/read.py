"""Reader of finished runs, in folders and in files of records, which have a run in each line."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError, DataError
from permllm.report.metrics import (
    Metric,
    method_of,
    plain,
    pruning_minutes,
    run_metrics,
    setting_text,
)
from permllm.settings.config import identity_of
from permllm.settings.identity import is_task_file, with_names
from permllm.settings.options import set_by_method
from permllm.settings.values import flatten
from permllm.store.files import (
    CONFIG,
    ENVIRONMENT,
    EVALUATIONS,
    HISTORY,
    LINES,
    METRICS,
    RECORDS,
    SCHEMA_VERSION,
    read_json,
    read_lines,
    read_yaml,
    write_text,
)

# Settings of a run that change no number.
_NO_SETTING = ("name", "save_weights")
# Settings that are paths of the machine.
_OF_MACHINE = ("runs_dir", "run_dir", "paths")


@dataclass
class Run:
    """Finished run.

    Attributes:
        directory: run directory; in a file of records the file and the name of the run.
        config: resolved settings.
        metrics: content of `metrics.json`.
        evaluations: all evaluations of the run, that of `metrics.json` first.
        environment: content of `environment.json`; empty: there is no such file.
        history: one entry for each epoch of learning.
        identity: settings that determine the pruned model, as one level.
        methods: text of the methods (`method_of`).
        minutes: those of `pruning_minutes`.
        results: metrics of the pruned and the dense model (`run_metrics`).
    """

    directory: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    identity: dict[str, Any] = field(init=False)
    methods: str = field(init=False)
    minutes: float = field(init=False)
    results: list[Metric] = field(init=False)

    def __post_init__(self) -> None:
        """Compute what tables read of the run.

        Raises DataError if the run is not finished or has another version, and LookupError or
        another of Python's errors if a value is missing.
        """
        version = self.metrics["schema_version"]
        if version != SCHEMA_VERSION:
            raise DataError(f"schema_version={version}: expected {SCHEMA_VERSION}")
        status = self.metrics["status"]
        if status != "finished":
            raise DataError(f"not finished ({status}); the same command continues it")
        self.identity = flatten(identity_of(self.config))
        for name in _NO_SETTING:
            self.identity.pop(name, None)
        self.methods = method_of(self.config)
        self.minutes = pruning_minutes(self.metrics["seconds"])
        model = str(self.config["model"]["name"])
        self.results = run_metrics(self.metrics, self.evaluations, model)

    def key(self, *spared: str) -> str:
        """Return a text that is equal for runs with the same identity but for `spared` settings."""
        settings = {key: value for key, value in self.identity.items() if key not in spared}
        return json.dumps(settings, sort_keys=True, default=str)

    def settings(self) -> dict[str, Any]:
        """Return the method and the settings of the identity but the seed, by their typed names."""
        # The identity has other allocations alone.
        settings = {"method": self._method(), "allocation": "uniform"}
        for key, value in self.identity.items():
            name = plain(key.removesuffix(".name"))
            if key.startswith("inputs."):
                settings[f"{name.removeprefix('inputs.')} (digest)"] = value[:8]
            elif key != "seed":
                settings[name] = value
        return settings

    def _method(self) -> str:
        """Return the option of the group `method`, and the settings that differ from its own.

        A value of the method that refers to other settings, such as a budget, may differ.
        """
        label: str = self.config.get("method") or ""
        values = flatten(self.config)
        for key, own in set_by_method(label).items():
            if "${" not in str(own) and values.get(key, own) != own:
                label += f", {key.removesuffix('.name')}={setting_text(values[key])}"
        return label


@dataclass(frozen=True)
class Collection:
    """Runs that a reader has found.

    Attributes:
        runs: finished runs.
        notes: a line for each run that is left out, and for each folder whose files of records
            have other names.
    """

    runs: list[Run]
    notes: list[str]


def collect(places: Iterable[Path], apart: bool = False) -> Collection:
    """Return every finished run in folders and in files of records, sorted by path.

    The folder of a sweep gives the runs of its jobs. In folders only files of records with the name
    `records.jsonl` are read.

    Args:
        places: folders and files.
        apart: True: also return runs with the identity of another run.

    Raises:
        ConfigError: a place does not exist, or no place has a finished run.
    """
    from permllm.store import sweep  # imports Hydra

    places = list(places)
    files = set()
    notes: list[str] = []
    jobs = [job for place in places for job in sweep.read_outcomes(place)]
    # Jobs that an earlier sweep did not finish are no loss if another sweep of the places did.
    finished = [job.overrides for job in jobs if job.directory]
    for job in jobs:
        if job.directory:
            files.add(Path(job.directory) / METRICS)
        elif job.overrides not in finished:
            notes.append(f"skipped {' '.join(job.overrides)}: {job.reason}")
    for place in places:
        if place.is_dir():
            inside = {*place.rglob(METRICS), *place.rglob(RECORDS)}
            files |= inside
            others = {file.name for file in place.glob(f"*{LINES}")} - {HISTORY}
            if others and not inside:
                notes.append(f"{place} has no {RECORDS}; name one of {', '.join(sorted(others))}")
        elif place.suffix == LINES and place.is_file():
            files.add(place)
        else:
            raise ConfigError(f"{place}: expected a directory, or a file of records (*{LINES})")
    runs = []
    for file in sorted(files):
        if file.name == METRICS:
            with skipping(str(file.parent), notes):
                runs.append(_of_directory(file.parent))
            continue
        for number, text in enumerate(file.read_bytes().splitlines(), 1):
            with skipping(f"{file}, line {number}", notes):
                line = json.loads(text)
                directory = file / line.pop("run")
                runs.append(Run(directory, **line))
    if not apart:
        runs = without_repeated(runs, notes)
    if not runs:
        below = ", ".join(map(str, places))
        raise ConfigError("; ".join([f"no finished run below {below}", *notes]))
    return Collection(runs, notes)


def runs_beside(directory: Path) -> list[Run]:
    """Return the finished runs whose directories lie in the same folder as a run directory."""
    notes: list[str] = []
    runs = []
    for file in sorted(directory.parent.glob(f"*/{METRICS}")):
        with skipping(str(file.parent), notes):
            runs.append(_read_once(file.parent, file.stat().st_mtime_ns))
    return without_repeated(runs, notes)


def without_repeated(runs: Iterable[Run], notes: list[str]) -> list[Run]:
    """Return the first run of each identity, and add a line to the notes for each other run.

    If both have the same tensors, the first run gets the evaluations that it lacks.
    """
    firsts: dict[str, Run] = {}
    for run in runs:
        key = run.key()
        first = firsts.setdefault(key, run)
        if first is not run:
            notes.append(
                f"{run.directory} has the same settings as {first.directory}: not counted again"
            )
            if run.metrics.get("sha256") == first.metrics.get("sha256"):
                had = [evaluation["evaluation_hash"] for evaluation in first.evaluations]
                new = [other for other in run.evaluations if other["evaluation_hash"] not in had]
                firsts[key] = replace(first, evaluations=[*first.evaluations, *new])
    return [*firsts.values()]


@contextmanager
def skipping(place: str, notes: list[str]) -> Iterator[None]:
    """Add a line to the notes, instead of the error, for a run that is not as a run leaves it."""
    try:
        yield
    except DataError as error:
        notes.append(f"skipped {place}: {error}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        notes.append(f"skipped {place}: not as a run leaves it: {error!r}")


@cache  # because each job of a sweep reads the runs of the jobs before it
def _read_once(directory: Path, modified: int) -> Run:
    """Return the run of a directory, whose `metrics.json` was `modified` at this time in ns."""
    return _of_directory(directory)


def _of_directory(directory: Path) -> Run:
    metrics = read_json(directory / METRICS)
    config = read_yaml(directory / CONFIG)
    if "inputs" not in config:
        raise DataError(f"{CONFIG} was cut short: it ends before `inputs`, the last of its keys")
    shown = metrics.get("evaluation_hash")
    evaluations = [read_json(file) for file in sorted((directory / EVALUATIONS).glob("*.json"))]
    # One that was interrupted may have the dense model alone.
    evaluations = [
        evaluation
        for evaluation in evaluations
        if evaluation.get("finished") or evaluation["evaluation_hash"] == shown
    ]
    evaluations.sort(key=lambda evaluation: evaluation["evaluation_hash"] != shown)
    environment = read_json(directory / ENVIRONMENT) if (directory / ENVIRONMENT).exists() else {}
    history = read_lines(directory / HISTORY)
    return Run(directory, config, metrics, evaluations, environment, history)


def keep_runs(places: Iterable[Path], file: Path) -> list[str]:
    """Write runs to a file of records, without paths of the machine, and return their names.

    A record has the values that tables need, without weights, permutations and masks. A run that is
    there with its record is kept once. The file is replaced.

    Raises ConfigError if a run is not finished or not readable, or there is no run, or the file has
    another suffix, so that no command would read it.
    """
    if file.suffix != LINES:
        raise ConfigError(f"--jsonl {file}: expected a file *{LINES}")
    collection = collect(places, apart=True)
    if collection.notes:
        raise ConfigError(f"--jsonl {file}: {collection.notes[0]}")
    lines = set()
    for run in collection.runs:
        config = {key: value for key, value in run.config.items() if key not in _OF_MACHINE}
        # The settings say what the command said, without folders of the machine.
        environment = {key: run.environment[key] for key in run.environment if key != "command"}
        name = run.directory.absolute().name  # Path(".").name is empty
        record = {
            "run": name,
            "config": with_names(config),
            "metrics": run.metrics,
            "evaluations": run.evaluations,
            "environment": environment,
            "history": run.history,
        }
        line = json.dumps(record)
        for task in filter(is_task_file, run.config.get("evaluation", {}).get("tasks", {})):
            line = line.replace(json.dumps(task)[1:-1], json.dumps(Path(task).name)[1:-1])
        lines.add((name, line))
    ordered = sorted(lines)
    write_text(file, "".join(f"{line}\n" for _, line in ordered))
    return [name for name, _ in ordered]
