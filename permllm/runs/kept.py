"""Finished runs in one file, a line each: what tables and documents are made from, without weights, permutations and masks."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError
from permllm.runs.files import write_text
from permllm.runs.names import LINES
from permllm.runs.read import Run, collect

# A folder that is named from the root, of whichever system.
_ABSOLUTE = re.compile(r"(/|\\\\|[A-Za-z]:[/\\])")
# Settings that name folders of the machine, which no result depends on.
_FOLDERS = ("runs_dir", "run_dir", "hydra.run.dir", "hydra.sweep.dir")


def keep_runs(places: Iterable[Path], file: Path) -> list[str]:
    """Write the runs in some places to a file, which is replaced, and return their names.

    Raises:
        ConfigError: the file has another suffix, a run cannot be kept, two have one name, or there is none.
    """
    if file.suffix != LINES:
        raise ConfigError(f"--jsonl {file}: expected a file whose name ends in {LINES}")
    found = collect(places, apart=True)
    if found.notes:
        raise ConfigError(f"--jsonl {file}: {found.notes[0]}")
    # An absolute path has a name also where the place is ".".
    runs = sorted((Path(os.path.abspath(run.directory)).name, number) for number, run in enumerate(found.runs))
    names = [name for name, _ in runs]
    if not names:
        raise ConfigError(f"--jsonl {file}: no finished run is among {', '.join(map(str, places))}")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"--jsonl {file}: {count} of the runs have the name {name}, under which one is kept")
    write_text(file, "".join(json.dumps({"run": name} | _line(found.runs[number])) + "\n" for name, number in runs))
    return names


def _line(run: Run) -> dict[str, Any]:
    line: dict[str, Any] = {"config": _of_any_machine(run.config), "metrics": run.metrics, "evaluations": run.evaluations}
    environment = dict(run.environment)
    if "command" in environment:
        environment["command"] = _typed_anywhere(environment["command"])
    return line | {key: value for key, value in (("environment", environment), ("history", run.history)) if value}


def _of_any_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without folders of the machine."""
    flat = dict(config) | {key: None for key in _FOLDERS if _ABSOLUTE.match(str(config.get(key)))}
    if config.get("paths"):
        flat["paths"] = {key: None if _ABSOLUTE.match(str(value)) else value for key, value in config["paths"].items()}
    return flat


def _typed_anywhere(command: str) -> str:
    """Return a command without the words that name such folders."""
    words = shlex.split(command)
    kept = []
    for word in words:
        key, _, value = word.partition("=")
        if not ((key in _FOLDERS or key.startswith("paths.")) and _ABSOLUTE.match(value.strip("'\""))):
            kept.append(word)
    return command if kept == words else shlex.join(kept)
