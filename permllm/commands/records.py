"""Keep finished runs in one file, a line each: what tables and documents are made from, without weights, orders and masks.

    permllm records runs/sweeps/table6-1a2b3c4d --to experiments/table6/records.jsonl --replace

`permllm results` reads the file like the folders. Where on a machine a run and its cache were is not kept. Of a sweep's folder
the runs of its jobs are kept.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from permllm.commands.answer import Answer
from permllm.config import PathsConfig
from permllm.errors import ConfigError
from permllm.identity import identity_of
from permllm.record.files import write_record_lines
from permllm.record.names import LINES
from permllm.results.collect import Run, collect

# Where runs are, by their settings, and where they are by themselves.
_PLACES = {"runs_dir": "runs", "run_dir": None}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument("places", nargs="+", type=Path, metavar="RUN", help="runs, sweeps, folders or files that hold some")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE.jsonl", help="where they are kept")
    parser.add_argument("--replace", action="store_true", help="let what was kept there go; else they are added to it")


def work(options: argparse.Namespace) -> Answer:
    """The names of what is kept now."""
    if options.to.suffix != LINES:
        raise ConfigError(f"--to {options.to}: expected a file whose name ends in {LINES}")
    # A name is what it is also where the folder was given as `.`
    given = [replace(run, directory=Path(os.path.abspath(run.directory))) for run in _all_of(options.places)]
    if not given:
        raise ConfigError(f"{', '.join(map(str, options.places))}: no finished run is among them")
    before = [] if options.replace or not options.to.exists() else _all_of([options.to])
    names = Counter(run.directory.name for run in given)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{twice[0]}: {names[twice[0]]} of the runs have this name, under which one is kept")
    kept = {run.directory.name: run for run in before}
    for run in given:
        other = kept.get(run.directory.name)
        if other is not None and identity_of(other.config) != identity_of(run.config):
            raise ConfigError(f"{options.to} has another run of the name {run.directory.name}: give it another name first")
        kept[run.directory.name] = run
    write_record_lines(options.to, [_line(run) for _, run in sorted(kept.items())])
    text = f"{options.to}: {len(kept)} runs, {len(given)} of them from {', '.join(map(str, options.places))}"
    return Answer({"file": str(options.to), "runs": sorted(kept)}, lambda: print(text))


def _all_of(places: list[Path]) -> list[Run]:
    found = collect(places, apart=True)
    if found.skipped:
        path, reason = found.skipped[0]
        raise ConfigError(f"{path} cannot be kept: {reason}")
    return found.runs


def _line(run: Run) -> dict[str, object]:
    line: dict[str, object] = {"run": run.directory.name, "config": _of_any_machine(run.config), "metrics": run.metrics}
    if run.environment:
        line["environment"] = dict(run.environment) | {"command": _typed_anywhere(run.environment["command"])}
    line |= {"history": run.history} if run.history else {}
    return line | ({"scores": {"evaluations": run.scores}} if run.scores else {})


def _of_any_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without folders of the machine, which no result depends on."""
    usual = asdict(PathsConfig())
    paths = {name: usual.get(name) if _of_a_machine(value or "") else value for name, value in config.get("paths", {}).items()}
    places = {name: value for name, value in _PLACES.items() if _of_a_machine(config.get(name) or "")}
    return dict(config) | places | ({"paths": paths} if paths else {})


def _typed_anywhere(command: str) -> str:
    """A command without the words that name such folders."""
    kept, words = [], shlex.split(command)
    for word in words:
        key, _, value = word.partition("=")
        of_folder = key in (*_PLACES, "hydra.run.dir", "hydra.sweep.dir") or key.startswith("paths.")
        if not (of_folder and _of_a_machine(value.strip("'\""))):
            kept.append(word)
    return command if kept == words else shlex.join(kept)


def _of_a_machine(folder: str) -> bool:
    """Whether a folder is named from the root, of whichever system."""
    return PurePosixPath(folder).is_absolute() or PureWindowsPath(folder).is_absolute()
