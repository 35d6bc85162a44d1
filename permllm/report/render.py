"""Tables of runs as text: with changes from a baseline and the paper's numbers, or printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from permllm.command import terminal
from permllm.report.compare import paired
from permllm.report.gaps import GAP
from permllm.report.metrics import AVERAGE, number
from permllm.report.printed import commands_for, print_table
from permllm.report.published import Comparison
from permllm.report.read import collect
from permllm.report.table import (
    DENSE_ROW,
    Table,
    choose,
    details,
    main_metric,
    naming,
    table_of,
    varying,
)

if TYPE_CHECKING:
    from permllm.store.sweep import Outcome  # imports Hydra

FORMATS = ("md", "csv", "latex", "json")
# Patterns of marks in the cells of a table, and the source of the uncertainty behind each.
_SOURCES = {
    "±": "± is the standard deviation over the seeds of a row, or in a row of one seed the "
    "standard error over the items",
    r"\[[+-]": "a 95 % interval is Student's t over the seeds' differences, with the variance of "
    "windows or items; with one seed it covers only variation between windows or items",
}


def as_text(frame: pd.DataFrame, format: str) -> str:
    """Return a frame of texts in one of `FORMATS` but `json`."""
    if format == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    if format == "latex":
        return str(frame.to_latex(index=False, escape=True))
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    cells = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


def sources(frame: pd.DataFrame) -> list[str]:
    """Return the sources of the uncertainties in a frame of texts, a line for each kind."""
    text = frame.to_csv(index=False)
    return [line for mark, line in _SOURCES.items() if re.search(mark, text)]


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame of texts as Markdown, with the lines of `sources` below it."""
    below = "; ".join(sources(frame))
    return as_text(frame, "md") + (f"\n{below[0].upper()}{below[1:]}.\n" if below else "")


def table_cells(
    table: Table, names: list[str] | None = None, paper: Comparison | None = None
) -> pd.DataFrame:
    """Return the cells of a table's metrics, one in each line.

    Args:
        table: table of the runs. With a baseline there are columns for the changes in the main
            metric and the average accuracy.
        names: metrics; None: the usual ones.
        paper: finder of the paper's numbers, which get columns beside ours; None: no such columns.

    Returns:
        heading of the `column`; `row` of the table, or `DENSE_ROW`; `value`; its `error` or
        `interval`; `text`, empty if there is no value. What there is not is NaN.
    """
    names = table.usual if names is None else names
    columns = {}
    main = main_metric(table, names)
    for name in names:
        kind = table.kind(name)
        prefix = "" if name == main else f"{name}, "
        cells = pd.DataFrame({"value": table.means[name], "error": table.errors[name]})
        cells["text"] = [table.shown(row, name) for row in cells.index]
        columns[table.heading(name)] = cells
        published = _published(table, paper, name)
        if paper and len(published):
            # Beside another model than the paper's, any text has the number of the paper's text.
            once = kind == "perplexity" and not paper.same_model
            heading = paper.heading if once else f"{prefix}{paper.heading}"
            columns.setdefault(heading, _cells(published, partial(number, kind=kind)))
        if table.baseline is None or name not in (main, AVERAGE):
            continue
        columns[f"{prefix}against the baseline"] = changes_from(table, table.baseline, name)
    return pd.concat(columns, names=["column", "row"]).reset_index()


def _cells(values: pd.Series, text: Callable[[float], str]) -> pd.DataFrame:
    """Return cells without errors."""
    values = values.dropna()
    return pd.DataFrame({"value": values, "text": values.map(text)})


def changes_from(table: Table, baseline: int, name: str) -> pd.DataFrame:
    """Return cells of the rows of the baseline's model that have a change from it in a metric."""
    pairs = {
        row: paired(table, row, baseline, name)
        for row, start in table.starts.items()
        if row != start == baseline and table.shown(row, name) and table.shown(baseline, name)
    }
    cells = pd.DataFrame.from_dict(pairs, "index", columns=["difference", "interval", "change"])
    return cells.set_axis(["value", "interval", "text"], axis=1)


def _published(table: Table, paper: Comparison | None, name: str) -> pd.Series:
    """Return the paper's numbers of a metric by row, without the rows that have none."""
    values = {}
    if paper and name not in table.gaps:
        firsts = table.measured[table.measured["metric"] == name].groupby("row")["detail"].first()
        values[DENSE_ROW] = paper.dense(name, firsts.iloc[0])
        for row in table.labels.index:
            values[row] = paper.value(table.members(row)[0].config, name, firsts.get(row))
    return pd.Series(values, dtype=float).dropna()


def texts(table: Table, cells: pd.DataFrame, columns: str | None = None) -> pd.DataFrame:
    """Return the texts of a table's cells (`table_cells`) between its settings.

    The index is the row. If all rows share the dense model, it is the first row.

    Args:
        table: table of the runs.
        cells: its cells.
        columns: settings to show, as in `naming`.
    """
    frame = cells.pivot(index="row", columns="column", values="text")[cells["column"].unique()]
    return _between_settings(table, frame, columns)


def lines(table: Table, cells: pd.DataFrame, columns: str | None = None) -> pd.DataFrame:
    """Return the numbers of a table's cells, one in each line, between the settings of its row."""
    frame = cells.dropna(subset="value").set_index("row").drop(columns="text")
    frame = frame.rename(columns={"column": "metric"})
    if "interval" in frame:
        ends = frame.pop("interval").astype(object).str
        frame["low"] = ends[0]
        frame["high"] = ends[1]
    return _between_settings(table, frame, columns)


def _between_settings(table: Table, frame: pd.DataFrame, columns: str | None) -> pd.DataFrame:
    """Return a frame of cells after the settings that name rows, and before the other ones."""
    labels = table.labels[naming(table.labels, columns)].copy()
    if len(table.runs) > len(labels):
        labels["seeds"] = [str(len(table.members(row))) for row in labels.index]
    others = table.labels[details(table.labels, columns)]
    frame = labels.join(frame, how="right").join(others).astype(object).fillna("")
    if DENSE_ROW in frame.index:
        frame.loc[DENSE_ROW, frame.columns[0]] = "dense"
    return frame


def records(table: Table, cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as plain values: settings, run directories, and metrics.

    A metric has its `mean` and `error`, or the `interval` of a change; `dense` has those of the
    dense model.
    """
    numbers = cells.drop(columns="text").rename(columns={"value": "mean"})
    metrics = {
        row: line.drop(columns="row").set_index("column").to_dict("index")
        for row, line in numbers.groupby("row")
    }
    settings = table.labels[varying(table.labels)].to_dict("index")
    return [
        {
            "settings": settings[row],
            "runs": [str(run.directory) for run in table.members(row)],
            "metrics": metrics[row],
            "dense": metrics.get(DENSE_ROW),
        }
        for row in table.labels.index
    ]


def print_sweep(jobs: Sequence[Outcome], folder: Path) -> None:
    """Print the table of a sweep's finished jobs, and a line for each job without a result."""
    if places := [Path(job.directory) for job in jobs if job.directory]:
        table = table_of(collect(places).runs)
        accuracy = AVERAGE if AVERAGE in table.usual else " acc"
        names = choose(table, f"perplexity (, {GAP}, {accuracy}, seconds")
        frame = texts(table, table_cells(table, names))
        print_table("jobs", [*frame], frame.to_numpy().tolist())
    others = [
        f"{job.outcome} {' '.join(job.overrides)}: {job.reason}" for job in jobs if job.reason
    ]
    counts = Counter(job.outcome for job in jobs)
    outcomes = [f"{counts[name]} {name}" for name in ("ran", "skipped", "failed") if counts[name]]
    lines = [*others, ", ".join(outcomes), commands_for(folder)]
    terminal().print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
