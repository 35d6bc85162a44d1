"""Finished runs in one file, a line each: what tables and documents are made from, without weights, permutations and masks."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError
from permllm.runs.files import write_text
from permllm.runs.names import LINES
from permllm.runs.read import Run, collect

# A folder of the machine, which no result depends on: named from the root, of whichever system.
_ABSOLUTE = r"['\"]*(/|\\\\|[A-Za-z]:[/\\])"


def keep_runs(places: Iterable[Path], file: Path) -> list[str]:
    """Write the runs in some places to a file, which is replaced, without paths of the machine; return their names.

    Raises:
        ConfigError: the file has another suffix, a run cannot be kept, two have one name, or there is none.
    """
    found = collect(places, apart=True)
    # An absolute path has a name also where the place is ".".
    names = Counter(Path(os.path.abspath(run.directory)).name for run in found.runs)
    twice = [f"{count} of the runs have the name {name}" for name, count in names.items() if count > 1]
    wrong = [] if file.suffix == LINES else [f"expected a file whose name ends in {LINES}"]
    wrong += found.notes + twice + ([] if names else ["no finished run is among them"])
    if wrong:
        raise ConfigError(f"--jsonl {file}: {wrong[0]}")
    lines = {Path(os.path.abspath(run.directory)).name: _line(run) for run in found.runs}
    write_text(file, "".join(json.dumps({"run": name} | lines[name]) + "\n" for name in sorted(lines)))
    return sorted(lines)


def _line(run: Run) -> dict[str, Any]:
    config, environment = dict(run.config), dict(run.environment)
    paths = {key: value for key, value in (config.get("paths") or {}).items() if not re.match(_ABSOLUTE, str(value))}
    config |= {key: None for key in ("runs_dir", "run_dir") if re.match(_ABSOLUTE, str(config.get(key)))}
    config |= {"paths": paths} if config.get("paths") else {}
    if "command" in environment:
        words = [word for word in environment["command"].split() if not re.match(rf"[\w.]*_?dir={_ABSOLUTE}", word)]
        environment["command"] = " ".join(words)
    line = {"config": config, "metrics": run.metrics, "evaluations": run.evaluations}
    return line | {key: value for key, value in (("environment", environment), ("history", run.history)) if value}
