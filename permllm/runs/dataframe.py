"""One frame of many runs, a row a run, and how its settings and numbers are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from permllm.runs.figures import pruning_minutes
from permllm.runs.measures import Measure, column_names, plain
from permllm.runs.read import Run

DENSE = "dense: "
# Groups of methods by their option that does nothing.
METHODS = {"permutation": "none", "mask": "pruner", "reconstruction": "none"}
# Settings that others say already: sizes of a model beside its name, paths beside the digests of their files.
_SPARE = ("inputs", "_target_", "path", "data_files", "architecture", "device", "hub_name", "source", "revision")
_FORMATS = {"accuracy": ".2%", "share": ".2%", "error": ".4f", "number": ".4g", "seconds": ".0f"}


def measures_of(runs: list[Run]) -> list[dict[str, Measure]]:
    """Return the measures of each run by column: those of the sparse model, and after `dense: ` those of the dense one."""
    named = column_names([key for run in runs for key in (*run.sparse, *run.dense)])
    return [
        {named[key]: measure for key, measure in run.sparse.items()}
        | {f"{DENSE}{named[key]}": measure for key, measure in run.dense.items()}
        for run in runs
    ]


def frame_of(runs: list[Run], measures: list[dict[str, Measure]]) -> pd.DataFrame:
    """Return settings, `seed`, `method`, measures, `minutes` and `directory` of each run."""
    lines = []
    for run, found in zip(runs, measures, strict=True):
        settings = {key: value for key, value in settings_of(run).items() if not is_spare(key)}
        line = settings | {"seed": run.config["seed"], "method": str(run.config.get("method") or "")}
        line |= {name: measure.value for name, measure in found.items()}
        lines.append(line | {"minutes": pruning_minutes(run.metrics["seconds"]), "directory": str(run.directory)})
    return pd.DataFrame(lines)


def settings_of(run: Run) -> dict[str, Any]:
    """Return all settings that make a result but the seed, by their names on the command line."""
    flat = {plain(key.removesuffix(".name")): value for key, value in run.identity.items() if key != "seed"}
    digests = {key: digest for key, digest in flat.items() if key.startswith("inputs.") and digest}
    return flat | {f"{key.removeprefix('inputs.')} (digest)": digest[:8] for key, digest in digests.items()}


def is_spare(name: str) -> bool:
    """Tell whether a setting says nothing that others do not say."""
    return any(part in _SPARE for part in name.split("."))


def setting_text(value: Any) -> str:
    """Return a setting's value as YAML has it, in one line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return plain(str(value))


def number(value: float, kind: str, error: float | None = None) -> str:
    """Return a number of a kind of measure, with its deviation or standard error, as it is shown."""
    form = _FORMATS.get(kind, ".2f")
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def sort_key(text: str) -> tuple[int, float, str]:
    """Return the key by which settings are sorted: `none` first, then numbers, then words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (-1, 0.0, "") if text == "none" else (1, 0.0, text)


def method_of(config: Mapping[str, Any]) -> str:
    """Return the names of a run's permutation, mask and reconstruction, without mask and reconstruction that do nothing."""
    names = {group: str((config.get(group) or {}).get("name", usual)) for group, usual in METHODS.items()}
    return ", ".join(name for group, name in names.items() if group == "permutation" or name != METHODS[group])
