"""One table of all runs below some directories: a column for whatever varies, mean and deviation over seeds.

permllm results runs --baseline permutation=none
permllm results runs/sweeps/table6-1a2b3c4d --jsonl experiments/table6/records.jsonl

The option --jsonl keeps the runs in one file instead, a line each, which is read like their
folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from permllm.errors import ConfigError
from permllm.runs.compare import comparison
from permllm.runs.read import Collection, collect, keep_runs
from permllm.runs.render import FORMATS, beside, compared, records, render
from permllm.runs.table import Table
from permllm.runtime.terminal import Answer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "places",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="runs, folders that hold some, or kept records",
    )
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument(
        "--columns", metavar="NAME,...", help="settings to show; default: those that vary"
    )
    parser.add_argument(
        "--measures", metavar="'NAME, ...'", help="measures to show, or parts of their names"
    )
    parser.add_argument(
        "--baseline", metavar="NAME=VALUE,...", help="compare with the row that has these settings"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="NAME=VALUE,...",
        help="two rows alone: their differences, with intervals over the windows and items that both were asked",
    )
    parser.add_argument(
        "--jsonl",
        type=Path,
        metavar="FILE.jsonl",
        help="write the runs there, a line each, and no table",
    )
    parser.add_argument(
        "--paper", metavar="TABLE", help="put the paper's numbers beside, for example table6"
    )


def work(options: argparse.Namespace) -> Answer:
    """Return the table, the comparison of two rows, or the names of the runs that were kept."""
    for alone in ("jsonl", "compare"):
        others = [
            name
            for name in ("jsonl", "compare", "baseline", "paper")
            if name != alone and getattr(options, name)
        ]
        if getattr(options, alone) and others:
            raise ConfigError(f"--{alone} goes without --{others[0]}")
    if options.jsonl:
        names = keep_runs(options.places, options.jsonl)
        return Answer(
            {"file": str(options.jsonl), "runs": names},
            lambda: print(f"{options.jsonl}: {len(names)} runs"),
        )
    table = Table(found_in(options.places).runs, options.baseline)
    paper = beside(options.paper, table)
    table.show(options.columns, options.measures)
    note([*table.notes, *([paper.note] if paper and paper.note else [])])
    if options.compare:
        differences = comparison(
            table, *(table.find(text, "--compare") for text in options.compare)
        )
        text = compared(differences, options.compare, options.format)
        return Answer(differences, lambda: print(text, end=""))
    # Intervals take their time: only what is printed is made.
    lines = records(table, paper) if options.json else []
    return Answer(lines, lambda: print(render(table, options.format, paper), end=""))


def found_in(places: list[Path]) -> Collection:
    """Return the runs in some places; name what is no run on stderr. Errors as `collect`."""
    found = collect(places)
    note(found.notes)
    return found


def note(lines: list[str]) -> None:
    """Print notes on stderr."""
    for line in lines:
        print(f"note: {line}", file=sys.stderr)
