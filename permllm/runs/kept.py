"""Finished runs in one file, a line each: what tables and documents are made from, without weights, permutations and masks."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from permllm.config import PathsConfig
from permllm.errors import ConfigError
from permllm.runs.files import write_record_lines
from permllm.runs.names import LINES
from permllm.runs.read import Run, collect

# Where runs are, by their settings, and where they are by themselves.
_PLACES = {"runs_dir": "runs", "run_dir": None}


def keep_runs(places: Iterable[Path], file: Path) -> list[str]:
    """Write the runs in some places to a file, which is replaced, and return their names.

    Paths of the machine are left out.

    Raises:
        ConfigError: the file has another suffix, a run cannot be kept, two have one name, or there is none.
    """
    if file.suffix != LINES:
        raise ConfigError(f"--jsonl {file}: expected a file whose name ends in {LINES}")
    found = collect(places, apart=True)
    if found.skipped:
        path, reason = found.skipped[0]
        raise ConfigError(f"--jsonl: {path} cannot be kept: {reason}")
    runs = found.runs
    # An absolute path has a name also where the place is ".".
    names = [Path(os.path.abspath(run.directory)).name for run in runs]
    if not names:
        raise ConfigError(f"--jsonl {file}: no finished run is among {', '.join(map(str, places))}")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"--jsonl {file}: {count} of the runs have the name {name}, under which one is kept")
    kept = sorted(zip(names, runs, strict=True), key=lambda pair: pair[0])
    write_record_lines(file, [{"run": name} | _line(run) for name, run in kept])
    return sorted(names)


def _line(run: Run) -> dict[str, object]:
    line: dict[str, object] = {"config": _of_any_machine(run.config), "metrics": run.metrics}
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
