"""A table as Markdown, CSV, LaTeX or JSON, with changes from a baseline and the paper's numbers beside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from permllm.config import finite
from permllm.errors import ConfigError
from permllm.runs.compare import Paired, change, paired
from permllm.runs.dataframe import number
from permllm.runs.published import Comparison, published
from permllm.runs.read import Run
from permllm.runs.table import Table

FORMATS = ("md", "csv", "latex", "json")


def as_text(frame: pd.DataFrame, format: str, words: int = 0) -> str:
    """Return a frame of texts as Markdown, CSV or LaTeX.

    Args:
        frame: cells as they are shown.
        format: `md`, `csv` or `latex`.
        words: number of first columns that LaTeX aligns to the left.
    """
    if format == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    if format == "latex":
        columns = "l" * words + "r" * (len(frame.columns) - words)
        return str(frame.to_latex(index=False, escape=True, column_format=columns)).replace("±", r"$\pm$")
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def render(table: Table, format: str, baseline: int | None = None, paper: Comparison | None = None) -> str:
    """Return a table in one of `FORMATS`; other arguments as `cells`."""
    if format == "json":
        return as_json(records(table, baseline, paper))
    return as_text(cells(table, baseline, paper), format, len(table.settings))


def as_json(value: Any) -> str:
    """Return plain values as JSON; None stands for infinity and for what is not a number."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def cells(table: Table, baseline: int | None = None, paper: Comparison | None = None) -> pd.DataFrame:
    """Return the cells of a table as they are shown, the dense model's row first, where all rows share it.

    Args:
        table: of the runs.
        baseline: row from which the others' changes in the main measure and the average accuracy are shown.
        paper: puts the published numbers beside ours.
    """
    rows = range(len(table.rows))
    found: dict[str, list[str]] = {name: ["", *(table.label(row, name) for row in rows)] for name in table.settings}
    if any(len(members) > 1 for members in table.rows):
        found["seeds"] = ["", *(str(len(members)) for members in table.rows)]
    main, changes = table.main(), changes_of(table, baseline, paper)
    for name in table.measures:
        kind, prefix = table.kinds[name], "" if name == main else f"{name}, "
        found[table.heading(name)] = [table.shown_dense(name), *(table.shown(row, name) for row in rows)]
        values = [_published(table, paper, row, name) for row in rows]
        if paper and any(value is not None for value in values):
            every = [paper.dense(name), *values]
            found[prefix + paper.heading] = ["" if value is None else number(value, kind) for value in every]
            if paper.same_model:
                ours = table.means.get(name, pd.Series(math.nan, rows)) - pd.Series(values, rows, dtype=float)
                scale = 100 if kind == "accuracy" else 1
                found[f"{prefix}difference"] = ["", *("" if math.isnan(one) else f"{one * scale:+.2f}" for one in ours)]
        titles = {"ours": "against the baseline"}
        if paper and not paper.same_model and any(value is not None for value in values):
            titles |= {"paper": "paper, against its baseline", "difference": "difference of the changes"}
        for key, title in titles.items() if name in changes else ():
            each = [one | ({} if key == "ours" else {"interval": None}) for one in changes[name]]
            found[f"{prefix}{title}"] = ["", *(_change_text(one[key], one["interval"], kind) for one in each)]
    frame = pd.DataFrame(found)
    if not table.dense:
        return frame.iloc[1:].reset_index(drop=True)
    frame.iloc[0, 0] = "dense"
    return frame


def changes_of(table: Table, baseline: int | None, paper: Comparison | None) -> dict[str, list[dict[str, Any]]]:
    """Return each row's changes from a baseline in the main measure and the average accuracy, as shares.

    Returns:
        By measure, for each row: `ours` and its `interval`; `paper` and the `difference` of the two, where the paper's numbers
        are of another model, so that only changes can be compared. None where there is none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    names = [name for name in table.measures if name in (table.main(), "average acc")] if baseline is not None else []
    for name in names:
        assert baseline is not None
        start = _published(table, paper, baseline, name)
        found[name] = []
        for row in range(len(table.rows)):
            ours = None if row == baseline else change(table, row, baseline, name)
            pair = None if ours is None else paired(table, row, baseline, name)
            interval = [pair.low, pair.high] if isinstance(pair, Paired) and pair.whole else None
            value, theirs = _published(table, paper, row, name), None
            if paper and not paper.same_model and ours is not None and value is not None and start is not None:
                theirs = value / start - 1 if table.kinds[name] == "perplexity" else value - start
            difference = None if ours is None or theirs is None else ours - theirs
            found[name].append({"ours": ours, "interval": interval, "paper": theirs, "difference": difference})
    return found


def records(table: Table, baseline: int | None = None, paper: Comparison | None = None) -> list[dict[str, Any]]:
    """Return the rows as plain values; arguments as `cells`."""
    changes = changes_of(table, baseline, paper)
    found = []
    for row, members in enumerate(table.rows):
        record: dict[str, Any] = {
            "settings": table.labels.loc[row, table.settings].to_dict(),
            "seeds": [table.runs[run].config["seed"] for run in members],
        }
        record["measures"] = {
            name: {
                "mean": float(table.means.at[row, name]),
                "deviation": table.error(row, name) if len(members) > 1 else None,
                "stderr": table.error(row, name) if len(members) == 1 else None,
                "limited": table.limited(name),
            }
            for name in table.measures
            if table.has(row, name)
        }
        record["dense"] = {name: {"mean": mean, "stderr": stderr} for name, (mean, stderr) in table.dense.items()}
        if paper:
            values = {name: _published(table, paper, row, name) for name in record["measures"]}
            record["paper"] = {"from": paper.heading} | {name: value for name, value in values.items() if value is not None}
        if baseline is not None:
            record["against_baseline"] = {name: each[row] for name, each in changes.items() if table.has(row, name)}
        record["runs"] = [str(table.runs[run].directory) for run in members]
        found.append(record)
    return found


def beside(name: str | None, table: Table) -> Comparison | None:
    """Return the paper's table of this name for some runs; None where no table is asked for."""
    return Comparison(published(name), sorted({run.config["model"]["name"] for run in table.runs})) if name else None


def take_baseline(table: Table, text: str | None) -> int | None:
    """Return the row that `--baseline` names and measure gaps from it; None where it names none. Errors as `find_row`."""
    if not text:
        return None
    baseline = find_row(table, text, "--baseline")
    table.close_gaps(baseline)
    return baseline


def find_row(table: Table, text: str, option: str) -> int:
    """Return the row with some settings, given as `name=value,name=value` after an option.

    Raises:
        ConfigError: a name is no setting, or not exactly one row has the values.
    """
    # A value may be a list: a comma parts settings where a name follows.
    wanted = dict(part.partition("=")[::2] for part in re.split(r",(?=[\w.]+=)", text))
    rows = list(range(len(table.rows)))
    for name, value in wanted.items():
        present = dict.fromkeys(filter(None, (table.label(row, name) for row in range(len(table.rows)))))
        if not present:
            raise ConfigError(f"{option} {text}: {name} is no column; valid are {', '.join(table.settings)}")
        if value not in present:
            raise ConfigError(f"{option} {text}: no row has {name}={value}; valid are {', '.join(present)}")
        rows = [row for row in rows if table.label(row, name) == value]
    if not rows:
        raise ConfigError(f"{option} {text}: no row has all of these settings")
    if len(rows) > 1:
        differ = [name for name in table.settings if len({table.label(row, name) for row in rows}) > 1]
        raise ConfigError(
            f"{option} {text}: {len(rows)} rows have these settings; they differ in {', '.join(differ)}: add one"
        )
    return rows[0]


def compared(found: list[dict[str, Any]], names: list[str], format: str) -> str:
    """Return `permllm.runs.compare.comparison` of two rows of these names in one of `FORMATS`."""
    if format == "json":
        return as_json(found)
    lines = []
    for line in found:
        unit, interval = _unit(line["kind"]), line["interval"]
        between = "" if interval is None else f"{interval[0] * 100:+.1f} to {interval[1] * 100:+.1f}{unit}"
        lines.append(
            (
                line["measure"],
                line["first"],
                line["second"],
                _change_text(line["difference"], None, line["kind"]),
                between,
                line["over"],
            )
        )
    header = ["measure", *names, "difference", "95 % interval", "over"]
    return as_text(pd.DataFrame(lines, columns=header), format, 1)


def machine(runs: Iterable[Run]) -> str:
    """Return what runs were computed with, in a line."""
    runs, found = list(runs), [run.environment for run in runs]
    names = {"python": "Python", "torch": "torch", "transformers": "transformers"}
    versions = sorted({", ".join(f"{shown} {one['versions'][name]}" for name, shown in names.items()) for one in found})
    commits = sorted({one["git"]["commit"][:10] + " with changes" * one["git"]["dirty"] for one in found if one.get("git")})
    started = sorted(one["started"][:10] for one in found)
    days = " to ".join(dict.fromkeys((started[0], started[-1])))
    of_code = [f"commit {', '.join(commits)}"] if commits else []
    return "; ".join([*sorted({_computed_on(run) for run in runs}), *versions, *of_code, days]) + "."


def _computed_on(run: Run) -> str:
    hardware = run.environment["hardware"]
    instructions = f" ({hardware['instructions']})" if "instructions" in hardware and "gpu" not in hardware else ""
    several = f", {hardware['processes']} processes" if "processes" in hardware else ""
    return f"{processor(run)}{instructions}, {hardware['threads']} threads{several}"


def processor(run: Run) -> str:
    """Return the GPU that a run was computed on, or else the processor."""
    hardware = run.environment["hardware"]
    return str(hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"])


def _published(table: Table, paper: Comparison | None, row: int, name: str) -> float | None:
    return paper.value(table.config(row), name, table.value(table.rows[row][0], name)) if paper else None


def _change_text(change: float | None, interval: list[float] | None, kind: str) -> str:
    between = "" if interval is None else f" [{interval[0] * 100:+.1f}, {interval[1] * 100:+.1f}]"
    return "" if change is None else f"{change * 100:+.1f}{_unit(kind)}{between}"


def _unit(kind: str) -> str:
    return " points" if kind in ("accuracy", "share") else "%"
