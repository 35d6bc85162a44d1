"""Tables of runs as text: with changes from a baseline and the paper's numbers, or printed."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape
from rich.table import Table as Printed

from permllm.command import terminal
from permllm.report.compare import paired
from permllm.report.gaps import GAP
from permllm.report.measures import (
    AVERAGE,
    DENSE,
    SECONDS,
    change_text,
    number,
    result_rows,
    sparsity_text,
)
from permllm.report.published import Comparison
from permllm.report.read import collect
from permllm.report.table import DENSE_ROW, Table, table_of
from permllm.store.files import EXPORT

if TYPE_CHECKING:
    from permllm.store.sweep import Outcome  # imports Hydra

FORMATS = ("md", "csv", "latex", "json")
# Patterns of marks in the cells of a table, and the source of the uncertainty behind each.
_SOURCES = {
    "±": "± is the standard deviation over the seeds of a row, or in a row of one seed the "
    "standard error over the items",
    r"\[[+-]": "a 95 % interval is Student's t over the seeds' differences, with the variance of "
    "windows or items; that of one seed knows windows or items alone",
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


def table_cells(table: Table, paper: Comparison | None = None) -> pd.DataFrame:
    """Return the cells of a table's measures, one in each line.

    Args:
        table: table of the runs. With a baseline there are columns for the changes in the main
            measure and the average accuracy.
        paper: finder of the paper's numbers, which get columns beside ours; None: no such columns.

    Returns:
        heading of the `column`; `row` of the table, or `DENSE_ROW`; `value`; its `error` or
        `interval`; `text`, empty if there is no value. What there is not is NaN.
    """
    columns = {}
    main = table.main()
    for name in table.measures:
        kind = table.kinds[name]
        prefix = "" if name == main else f"{name}, "
        cells = pd.DataFrame({"value": table.means[name], "error": table.errors[name]})
        cells["text"] = [table.shown(row, name) for row in cells.index]
        columns[table.heading(name)] = cells
        published = published_values(table, paper, name)
        if paper and len(published):
            # Beside another model than the paper's, any text has the number of the paper's text.
            once = kind == "perplexity" and not paper.same_model
            heading = paper.heading if once else f"{prefix}{paper.heading}"
            columns.setdefault(heading, _cells(published, partial(number, kind=kind)))
        if table.baseline is None or name not in (main, AVERAGE):
            continue
        changes = _changes(table, table.baseline, name)
        columns[f"{prefix}against the baseline"] = changes
        if paper and not paper.same_model and table.baseline in published:
            start = published[table.baseline]
            of_paper = published / start - 1 if kind == "perplexity" else published - start
            of_paper = of_paper.reindex(changes.index)
            text = partial(change_text, kind=kind)
            columns[f"{prefix}paper, against its baseline"] = _cells(of_paper, text)
            difference = changes["value"] - of_paper
            columns[f"{prefix}difference of the changes"] = _cells(difference, text)
    return pd.concat(columns, names=["column", "row"]).reset_index()


def _cells(values: pd.Series, text: Callable[[float], str]) -> pd.DataFrame:
    """Return cells without errors."""
    values = values.dropna()
    return pd.DataFrame({"value": values, "text": values.map(text)})


def _changes(table: Table, baseline: int, name: str) -> pd.DataFrame:
    """Return cells of the rows of the baseline's model that have a change from it in a measure."""
    pairs = {}
    for row in table.labels.index:
        of_model = table.starts.get(row) == baseline
        if row != baseline and of_model and table.has(row, name) and table.has(baseline, name):
            pairs[row] = paired(table, row, baseline, name)
    cells = pd.DataFrame.from_dict(pairs, "index", columns=["difference", "interval", "change"])
    return cells.set_axis(["value", "interval", "text"], axis=1)


def published_values(table: Table, paper: Comparison | None, name: str) -> pd.Series:
    """Return the paper's numbers of a measure by row, without the rows that have none."""
    values = {}
    if paper:
        of_dense = [run[DENSE + name] for run in table.values if DENSE + name in run]
        values[DENSE_ROW] = paper.dense(name, of_dense[0] if of_dense else None)
        for row in table.labels.index:
            run = table.members(row).index[0]
            values[row] = paper.value(table.runs[run].config, name, table.values[run].get(name))
    return pd.Series(values, dtype=float).dropna()


def texts(table: Table, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the texts of a table's cells (`table_cells`) between its settings.

    The index is the row. If all rows share the dense model, it is the first row.
    """
    frame = cells.pivot(index="row", columns="column", values="text")[cells["column"].unique()]
    return _between_settings(table, frame)


def numbers(table: Table, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the numbers of a table's cells between its settings, errors and intervals beside."""
    columns = {}
    for name, part in cells.set_index("row").groupby("column", sort=False):
        columns[name] = part["value"]
        columns[f"{name} ±"] = part["error"]
        if "interval" in part and part["interval"].notna().any():
            ends = part["interval"].dropna()
            columns[f"{name}, low"] = ends.str[0]
            columns[f"{name}, high"] = ends.str[1]
    return _between_settings(table, pd.DataFrame(columns).dropna(axis=1, how="all").sort_index())


def _between_settings(table: Table, measures: pd.DataFrame) -> pd.DataFrame:
    """Return columns of measures after the settings that name rows, and before the other ones.

    Seconds of rows with different numbers of threads have these numbers beside them.
    """
    labels = table.labels[table.settings].copy()
    seeds = table.frame["row"].value_counts()
    if seeds.max() > 1:
        labels["seeds"] = seeds.map(str)
    threads = table.frame.groupby("row")["threads"].agg(lambda of_row: ", ".join(sorted({*of_row})))
    if SECONDS in measures and threads.nunique() > 1:
        measures = measures.join(threads)
    frame = labels.reindex(measures.index).join(measures).join(table.labels[table.details()])
    frame = frame.astype(object).fillna("")
    if DENSE_ROW in frame.index:
        frame.loc[DENSE_ROW, frame.columns[0]] = "dense"
    return frame


def records(table: Table, cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as plain values, with its cells (`table_cells`).

    Each measure has its `mean`, a `deviation` over the seeds or the `stderr` of a single run, and
    the `interval` of a change; `dense` has those of the dense model.
    """
    measures: dict[Any, dict[str, Any]] = {DENSE_ROW: {}}
    for row, line in cells.groupby("row"):
        error = "deviation" if len(table.members(row)) > 1 else "stderr"
        values = line.set_index("column").rename(columns={"value": "mean", "error": error})
        measures[row] = values.drop(columns=["row", "text"]).to_dict("index")
    dense = measures.pop(DENSE_ROW)
    rows = []
    for row, values_of_row in measures.items():
        runs = table.members(row)
        rows.append(
            {
                "settings": table.labels.loc[[row], table.varied].to_dict("records")[0],
                "seeds": runs["seed"].tolist(),
                "measures": values_of_row,
                "dense": dense,
                "runs": runs["directory"].tolist(),
            }
        )
    return rows


def print_run(metrics: dict[str, Any], directory: Path) -> None:
    """Print one finished run: its measures, sparsity, time, memory, files and export."""
    _print_table(metrics["name"], ["", "dense", "sparse"], result_rows(metrics), "right")
    sparsity = metrics["sparsity"]
    seconds = metrics["seconds"]
    retained = statistics.fmean(metrics["retained_saliency"].values())
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    memory = f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak"
    if "planned_memory_bytes" in metrics:
        memory += f" ({metrics['planned_memory_bytes'] / 1e9:.2f} GB were planned)"
    lines = {
        "sparsity": f"{sparsity_text(sparsity)} ({sparsity['fraction']:.2%} zeros, "
        f"{sparsity['violations']} violations, {retained:.2%} of the saliency retained)",
        "time": f"{_duration(sum(seconds.values()))} ({phases})",
        "memory": memory,
        "files": directory,
    }
    if (directory / EXPORT).is_dir():
        lines["export"] = directory / EXPORT
    for name, text in lines.items():
        terminal().print(f"{name:9} {text}", markup=False, soft_wrap=True)


def print_sweep(jobs: Sequence[Outcome]) -> None:
    """Print a table with a row for each finished job of a sweep, and a line for each other job."""
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    rows = []
    others = []
    places = [Path(job.directory) for job in jobs if job.directory]
    measures = _measures_of_runs(places) if places else pd.DataFrame()
    for job in jobs:
        words = " ".join(word for word in job.overrides if word not in shared).replace("\\", "")
        if job.directory in measures.index:
            rows.append((words, job.outcome, *measures.loc[job.directory]))
        else:
            others.append(f"{job.outcome} {words}: {job.reason}")
    if rows:
        dense = measures.iloc[0]
        rows.insert(0, ("dense", "" if any(dense) else "not shared", *dense))
        _print_table("jobs", ["job", "outcome", *measures], rows, "right")
    counts = Counter(job.outcome for job in jobs)
    outcomes = [f"{counts[name]} {name}" for name in ("ran", "skipped", "failed") if counts[name]]
    lines = [*others, ", ".join(outcomes)]
    terminal().print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)


def _measures_of_runs(directories: list[Path]) -> pd.DataFrame:
    """Return the texts of the main measures, first of the dense model, then by run directory."""
    table = table_of(collect(directories).runs)
    accuracy = AVERAGE if AVERAGE in table.measures else " acc"
    table.show(None, f"perplexity (, {GAP}, {accuracy}, seconds")
    columns = {}
    for name in table.measures:
        form = partial(number, kind=table.kinds[name])
        values = table.means[name].reindex([DENSE_ROW]).tolist() + table.frame[name].tolist()
        columns[table.heading(name)] = ["" if pd.isna(value) else form(value) for value in values]
    return pd.DataFrame(columns, ["", *table.frame["directory"]])


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _print_table(title: str, header: list[str], rows: Iterable[Sequence[str]], side: Any) -> None:
    """Print a table of texts; all columns but the first are aligned to one side."""
    printed = Printed(title=escape(title), title_justify="left")
    for place, name in enumerate(header):
        printed.add_column(escape(name), justify=side if place else "left", overflow="fold")
    for row in rows:
        printed.add_row(*map(escape, row))
    terminal().print(printed)
