"""One table of all runs below some directories: a column for whatever varies, mean and deviation over seeds.

permllm results runs/sweeps/table6-1a2b3c4d --jsonl experiments/table6/records.jsonl

The option --jsonl keeps the runs in one file instead, a line each, which is read like their folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from permllm.errors import ConfigError
from permllm.runs.kept import keep_runs
from permllm.runs.published import beside
from permllm.runs.read import collect
from permllm.runs.render import (
    FORMATS,
    compared,
    comparison,
    find_row,
    records,
    render,
    take_baseline,
    without_interval,
)
from permllm.runs.table import summarise
from permllm.runtime.terminal import Answer


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="runs, folders that hold some, or kept records")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument("--baseline", metavar="NAME=VALUE,...", help="compare with the row that has these settings")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="NAME=VALUE,...",
        help="two rows alone: their differences, with intervals over the windows and items that both were asked",
    )
    parser.add_argument("--jsonl", type=Path, metavar="FILE.jsonl", help="write the runs there, a line each, and no table")
    parser.add_argument("--paper", metavar="TABLE", help="put the paper's numbers beside, for example table6")


def work(options: argparse.Namespace) -> Answer:
    """The table, or what was kept."""
    if options.jsonl:
        _refuse_beside("jsonl", options, "baseline", "compare", "paper")
        names = keep_runs(options.places, options.jsonl)
        return Answer({"file": str(options.jsonl), "runs": names}, lambda: print(f"{options.jsonl}: {len(names)} runs"))
    collection = collect(options.places)
    for note in collection.left_out():
        print(f"note: {note}", file=sys.stderr)
    if not collection.runs:
        raise ConfigError("no finished run is among them")
    summary = summarise(collection.runs)
    if options.compare:
        _refuse_beside("compare", options, "baseline", "paper")
        for note in summary.notes:
            print(f"note: {note}", file=sys.stderr)
        first, second = (find_row(summary, text, "--compare") for text in options.compare)
        differences = comparison(first, second, summary)
        answer = compared(differences, options.compare[0], options.compare[1], options.format)
        return Answer(differences, lambda: print(answer, end=""))
    paper = beside(options.paper, collection.runs)
    baseline = take_baseline(summary, options.baseline)
    notes = without_interval(summary, baseline) if baseline is not None else []
    notes += [paper.note] if paper and paper.note else []
    for note in [*summary.notes, *notes]:
        print(f"note: {note}", file=sys.stderr)
    # Intervals take their time: only what is printed is made.
    rows = records(summary, baseline, paper) if options.json else []
    return Answer(rows, lambda: print(render(summary, options.format, baseline, paper), end=""))


def _refuse_beside(option: str, options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name):
            raise ConfigError(f"--{option} goes without --{name}")
