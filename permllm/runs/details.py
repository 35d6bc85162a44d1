"""What is told of each run beside its numbers: its settings, what a reader must know of it, what it was computed with."""

from __future__ import annotations

from typing import Any

from permllm.config import flatten
from permllm.runs import evaluations
from permllm.runs.names import ENVIRONMENT
from permllm.runs.pictures import pictures
from permllm.runs.read import Run
from permllm.runs.render import heading, shown
from permllm.runs.table import Row, Summary, flat_settings, setting_text, summarise

# What runs may take of a page that stays below 6 MB, of which libraries have 2.3; and about what one takes without pictures.
ROOM_BYTES = 3_500_000
RUN_BYTES = 12_000
LEFT_OUT = "left out, so that the page stays small: make one of fewer runs"


def details(summary: Summary) -> list[dict[str, Any]]:
    """Of each run, row by row, as texts.

    Returns:
        The `row` and the `seed`, `hash`, `warnings`, `varying` (columns of the table: name, value) and all other `settings`,
        `measures` (name, dense, sparse), `seconds` by stage and in all, `environment` (name, value), `versions`, and
        `pictures`, of so many runs as a page has room for.
    """
    runs = [(number, row, run) for number, row in enumerate(summary.rows) for run in row.runs]
    found, room = [], ROOM_BYTES - RUN_BYTES * len(runs)
    for number, row, run in runs:
        drawn = pictures(run.directory)
        room -= sum(len(picture["image"]) for some in drawn.values() if not isinstance(some, str) for picture in some)
        which = {"row": number, "seed": setting_text(run.config.get("seed")), "hash": run.metrics["config_hash"]}
        told = {"warnings": warnings(run), "pictures": drawn if room >= 0 else dict.fromkeys(drawn, LEFT_OUT)}
        found.append(which | told | _settings(row, run) | _measured(run))
    return found


def _settings(row: Row, run: Run) -> dict[str, Any]:
    others = {key: value for key, value in flat_settings(run.config).items() if key not in row.labels}
    return {
        "varying": [(name, label) for name, label in row.labels.items() if label],
        "settings": ", ".join(f"{key}={setting_text(value)}" for key, value in others.items()),
    }


def _measured(run: Run) -> dict[str, Any]:
    alone = summarise([run])
    seconds, environment = run.metrics["seconds"], run.environment
    where = flatten({key: value for key, value in environment.items() if key != "versions"})
    sizes = ("planned_memory_bytes", "peak_memory_bytes", "peak_host_memory_bytes")
    peaks = {key: run.metrics[key] for key in sizes if key in run.metrics}
    facts = [(_named(key), _size_or_text(key, value)) for key, value in (where | peaks).items()]
    return {
        "measures": [
            (heading(alone, name), shown(alone.dense[name]) if name in alone.dense else "", shown(measure))
            for name, measure in alone.rows[0].measures.items()
        ],
        "seconds": [(stage, f"{value:.1f}") for stage, value in (seconds | {"all": sum(seconds.values())}).items()],
        "environment": [*facts, ("directory", str(run.directory)), ("config hash", run.metrics["config_hash"])],
        "versions": ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items()),
    }


def warnings(run: Run) -> list[str]:
    """What a reader must know before trusting a run's numbers."""
    found = []
    metrics, environment = run.metrics, run.environment
    if violations := metrics["sparsity"]["violations"]:
        found.append(f"{violations} groups of M hold more than N nonzeros")
    for entry in evaluations.all_of(metrics):
        windows = entry["evaluation"].get("perplexity", {}).get("limit")
        if windows is not None and entry.get("perplexity"):
            found.append(f"limited: perplexity on the first {windows} windows only")
        items = entry["evaluation"].get("zero_shot", {}).get("limit")
        if items is not None and entry.get("zero_shot"):
            found.append(f"limited: accuracy on the first {items} items of each task only")
    found = list(dict.fromkeys(found))
    if not environment:
        found.append(f"no {ENVIRONMENT}: what it was computed with is not known")
    elif not environment.get("git"):
        found.append("computed outside a checkout: its commit is not known")
    elif environment["git"]["dirty"]:
        found.append("computed in a checkout with changes that its commit does not have")
    return found


def _named(key: str) -> str:
    return key.removeprefix("git.").removeprefix("hardware.").removesuffix("_bytes").replace("_", " ")


def _size_or_text(key: str, value: Any) -> str:
    return f"{value / 1e9:.2f} GB" if key.endswith("_bytes") and isinstance(value, int | float) else setting_text(value)
