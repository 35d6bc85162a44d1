"""Command `permllm results`: one table of many runs, or one file."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from permllm.command import Answer, as_json, refuse
from permllm.report.compare import differences
from permllm.report.published import TABLES, Comparison
from permllm.report.read import collect, keep_runs
from permllm.report.render import FORMATS, as_text, lines, records, sources, table_cells, texts
from permllm.report.table import choose, find, notes, table_of

PLACES = "run directories, folders with run directories, or files of records"
BASELINE = "compare with the row that has these settings"
PAPER = "show the paper's numbers beside ours, such as table6"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Print a table of runs, with a column for each setting that varies, and means over seeds.

    permllm results runs --baseline permutation=none
    permllm results runs/sweeps/table6-1a2b3c4d --jsonl experiments/table6/records.jsonl

    With --jsonl the runs are written to a file of records instead, one run in each line. Commands
    read such a file like the run directories.
    """
    add = parser.add_argument
    settings = "NAME=VALUE,..."
    add("places", nargs="+", type=Path, metavar="DIR", help=PLACES)
    add("--format", choices=FORMATS, default="md")
    add("--columns", metavar="NAME,...", help="settings to show; default: those that vary")
    add("--metrics", metavar="'NAME, ...'", help="metrics to show, or parts of their names")
    add("--baseline", metavar=settings, help=BASELINE)
    add("--paper", choices=TABLES, metavar="TABLE", help=PAPER)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compare",
        nargs=2,
        metavar=settings,
        help="show only the differences of two rows, with their intervals",
    )
    instead.add_argument(
        "--jsonl", type=Path, metavar="FILE.jsonl", help="write the runs to this file; no table"
    )


def work(options: argparse.Namespace) -> Answer:
    """Return the table or the comparison of two rows, or write a file of records."""
    if options.jsonl:
        table_alone = ("columns", "metrics", "baseline", "paper")
        refuse(options, table_alone, "--jsonl writes whole runs")
        names = keep_runs(options.places, options.jsonl)
        answer = {"file": str(options.jsonl), "runs": names}
        return Answer(answer, lambda: print(f"{options.jsonl}: {len(names)} runs"))
    collection = collect(options.places)
    table = table_of(collection.runs, options.baseline)
    names = choose(table, options.metrics)
    columns = options.columns
    paper = Comparison(options.paper, table.labels["model"]) if options.paper else None
    note([*collection.notes, *notes(table, names, columns), *(paper.notes if paper else [])])
    if options.compare:
        first, second = [find(table.labels, text, "--compare") for text in options.compare]
        metrics = differences(table, first, second, names)
        frame = pd.DataFrame(metrics, columns=["metric", "first", "second", "change", "over"])
        frame = frame.set_axis(["metric", *options.compare, "difference", "over"], axis=1)
        value: Any = metrics
    else:
        cells = table_cells(table, names, paper)
        frame = (lines if options.format == "csv" else texts)(table, cells, columns)
        value = records(table, cells)
    if options.format == "json":
        return Answer(value, lambda: print(as_json(value)))
    return Answer(value, lambda: _show(frame, options.format))


def _show(frame: pd.DataFrame, format: str) -> None:
    """Print a frame as `as_text` makes it, and the sources of its uncertainties on stderr."""
    print(as_text(frame, format), end="")
    note(sources(frame))


def note(lines: list[str]) -> None:
    """Print notes on stderr."""
    for line in lines:
        print(f"note: {line}", file=sys.stderr)
