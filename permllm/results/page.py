"""Runs as one HTML page that needs nothing else: the table, its plots, and for each run what it was and what it found."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from permllm.identity import FROM_THE_TOP, identity_of
from permllm.nested import flatten
from permllm.record import evaluations
from permllm.record.names import ENVIRONMENT
from permllm.results.collect import Collection, Run
from permllm.results.pictures import pictures
from permllm.results.plots import numeric_setting
from permllm.results.published import Comparison
from permllm.results.render import cells, main_measure, shown
from permllm.results.summary import Measure, Row, Summary, row_labels, setting_text, summarise

NOT_SET = "not set"
_CURVES = ("loss", "measured_loss", "temperature", "flips")


def page(collection: Collection, summary: Summary, baseline: Row | None = None, paper: Comparison | None = None) -> str:
    """The page as text: styles, scripts and data are inside, and its policy forbids it to load anything.

    Args:
        collection: what was found.
        summary: of its runs.
        baseline: a row that the others are compared with, as for `render`.
        paper: puts the published numbers beside ours.
    """
    script = "".join(_template(name) for name in ("page_plots.js", "page_pictures.js", "page.js"))
    parts = {
        "title": f"PermLLM: {len(collection.runs)} runs",
        "style": _template("page.css"),
        "script": script,
        # With its digest in the policy no other script can run, whatever a record says.
        "digest": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": _json_in_html(page_data(collection, summary, baseline, paper)),
    }
    # In one pass: what is put in is not searched for further places.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _template("page.html"))


def page_data(
    collection: Collection, summary: Summary, baseline: Row | None = None, paper: Comparison | None = None
) -> dict[str, Any]:
    """All that the page shows, as plain values without NaN and infinity."""
    header, body = cells(summary, baseline, paper)
    dense = body.pop(0) if summary.dense else None
    runs = [(number, run) for number, row in enumerate(summary.rows) for run in row.runs]
    numeric = numeric_setting(summary)
    learned = [number for number, row in enumerate(summary.rows) if any(curves(run.history) for run in row.runs)]
    rows = []
    for number, (row, line, label) in enumerate(zip(summary.rows, body, row_labels(summary), strict=True)):
        rows.append(
            {
                "label": label,
                "cells": line,
                "keys": sort_keys(summary, row, header, line),
                "x": float(row.labels[numeric]) if numeric else None,
                "measures": {name: _measure(measure) for name, measure in row.measures.items()},
                "baseline": row is baseline,
                "series": learned.index(number) if number in learned else None,
                "runs": [index for index, (owner, _) in enumerate(runs) if owner == number],
            }
        )
    differing = differences([run.config for _, run in runs])
    return _finite(
        {
            "columns": [{"name": name, "setting": i < len(summary.settings)} for i, name in enumerate(header)],
            "dense": dense,
            "rows": rows,
            "numeric": numeric,
            "main": main_measure(summary),
            "measures": [_column(summary, name, header) for name in summary.measures],
            "runs": [
                {"row": number, "differs": differs} | _run(run) for (number, run), differs in zip(runs, differing, strict=True)
            ],
            "notes": [*collection.notes(), *summary.notes, *([paper.note] if paper and paper.note else [])],
        }
    )


def sort_keys(summary: Summary, row: Row, header: list[str], line: list[str]) -> list[float | str | None]:
    """What each cell of a row is sorted by: a number, the mean of a measure, a word, or None where it is empty.

    Args:
        summary: of which the row is.
        row: whose measures give the means.
        header: of `cells`.
        line: the row of `cells`.
    """
    keys: list[float | str | None] = []
    for position, (name, text) in enumerate(zip(header, line, strict=True)):
        measure = row.measures.get(name.removesuffix(" (limited)"))
        if position < len(summary.settings):
            keys.append(_number(text, text or None))
        elif measure is not None:
            keys.append(measure.mean)
        else:
            keys.append(_number(text.split(" ")[0].rstrip("%"), None))
    return keys


def differences(configs: list[dict[str, Any]]) -> list[list[tuple[str, str, str]]]:
    """What sets each config apart: `(setting, its value, the usual value)`.

    The usual value is that of more than half of the configs, or the first config's where no value is. Settings that a config
    lacks only because it chose another member of their group are not listed: the group's `name` says it.
    """
    flat = [_flat(config) for config in configs]
    usual = {}
    for name in dict.fromkeys(name for values in flat for name in values):
        every = [values.get(name, NOT_SET) for values in flat]
        value, count = Counter(every).most_common(1)[0]
        usual[name] = value if 2 * count > len(every) else every[0]
    found = []
    for values in flat:
        other_group = {
            name.split(".")[0] for name, value in usual.items() if name.endswith(".name") and values.get(name) != value
        }
        found.append(
            [
                (name, values.get(name, NOT_SET), value)
                for name, value in usual.items()
                if values.get(name, NOT_SET) != value and (name in values or _group(name) not in other_group)
            ]
        )
    return found


def _group(name: str) -> str:
    """The group whose option decides whether a run has this setting."""
    first = name.split(".", maxsplit=1)[0]
    return "permutation" if first in FROM_THE_TOP else first


def curves(history: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """What can be drawn of a history, one value an entry; None where the entry has none."""
    found = {}
    for key in _CURVES:
        values = [entry.get(key) for entry in history]
        if any(value is not None for value in values):
            found[key] = values
    return found


def _run(run: Run) -> dict[str, Any]:
    alone = summarise([run])
    environment = run.environment
    where = flatten({key: value for key, value in environment.items() if key != "versions"})
    peaks = {key: run.metrics[key] for key in ("peak_memory_bytes", "peak_host_memory_bytes") if key in run.metrics}
    return {
        "name": run.metrics["name"],
        "hash": run.metrics["config_hash"],
        "seed": setting_text(run.config.get("seed")),
        "directory": str(run.directory),
        "warnings": warnings(run),
        "measures": [
            (name, shown(alone.dense[name]) if name in alone.dense else "", shown(measure), measure.limited)
            for name, measure in alone.rows[0].measures.items()
        ],
        "seconds": run.metrics["seconds"],
        "environment": [(_plain(key), _size_or_text(key, value)) for key, value in (where | peaks).items()],
        "versions": [f"{name} {version}" for name, version in environment.get("versions", {}).items()],
        "curves": curves(run.history),
    } | pictures(run.directory)


def warnings(run: Run) -> list[str]:
    """What a reader must know before trusting a run's numbers."""
    found = []
    metrics, environment = run.metrics, run.environment
    if violations := metrics["sparsity"]["violations"]:
        found.append(f"{violations} groups of M hold more than N nonzeros")
    for entry in evaluations.all_of(metrics, run.config):
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


def _column(summary: Summary, name: str, header: list[str]) -> dict[str, Any]:
    kind = next(row.measures[name].kind for row in summary.rows if name in row.measures)
    heading = next(text for text in header if text.removesuffix(" (limited)") == name)
    dense = _measure(summary.dense[name]) if name in summary.dense else None
    return {"name": name, "heading": heading, "kind": kind, "dense": dense}


def _measure(measure: Measure) -> dict[str, Any]:
    return {"mean": measure.mean, "error": measure.error, "text": shown(measure)}


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """Dotted settings that make a result, as texts, each once."""
    flat = {
        key: setting_text(value)
        for key, value in flatten(identity_of(config)).items()
        if key != "name" and key.split(".")[-1] != "_target_"
    }
    return {key: value[:12] if key.startswith("inputs.") else value for key, value in flat.items()}


def _plain(key: str) -> str:
    return key.removeprefix("git.").removeprefix("hardware.").removesuffix("_bytes").replace("_", " ")


def _size_or_text(key: str, value: Any) -> str:
    return f"{value / 1e9:.2f} GB" if key.endswith("_bytes") and isinstance(value, int | float) else setting_text(value)


def _number(text: str, otherwise: str | None) -> float | str | None:
    try:
        number = float(text)
    except ValueError:
        return otherwise
    return number if math.isfinite(number) else otherwise


def _finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON in a browser has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_in_html(value: Any) -> str:
    """JSON that cannot end the script element it stands in: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _template(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
