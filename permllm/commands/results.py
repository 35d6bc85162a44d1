"""One table of all runs below some directories: a column for whatever varies, mean and deviation over seeds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from permllm.commands.answer import Answer
from permllm.commands.report import write_page
from permllm.errors import ConfigError
from permllm.results.collect import collect
from permllm.results.published import beside
from permllm.results.render import (
    FORMATS,
    compared,
    comparison,
    find_row,
    records,
    render,
    take_baseline,
    undrawn,
    without_interval,
)
from permllm.results.summary import summarise


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
    parser.add_argument("--paper", metavar="TABLE", help="put the paper's numbers beside, for example table6")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the main measure and the loss curves")
    parser.add_argument("--masks", type=Path, metavar="FILE.png", help="draw the mask of one linear under every row")
    parser.add_argument("--linear", metavar="PATH", help="whose mask; default: the first one of the middle layer")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write one page with the table, plots and each run")


def work(options: argparse.Namespace) -> Answer:
    """The table, and the pictures that were asked for."""
    collection = collect(options.places)
    for note in collection.left_out():
        print(f"note: {note}", file=sys.stderr)
    if not collection.runs:
        raise ConfigError("no finished run is among them")
    summary = summarise(collection.runs)
    if options.compare:
        _refuse_beside_compare(options)
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
    notes += undrawn(summary, None) if options.plot else []
    for note in [*summary.notes, *notes]:
        print(f"note: {note}", file=sys.stderr)
    # What draws takes longer to import than a table takes.
    if options.plot:
        from permllm.results.plots import plot

        plot(summary, options.plot)
    if options.masks:
        from permllm.results.plots import plot_masks

        plot_masks(summary, options.masks, options.linear)
    if options.html:
        write_page("--html", options.html, collection, summary, baseline, paper)
    # Intervals take their time: only what is printed is made.
    rows = records(summary, baseline, paper) if options.json else []
    return Answer(rows, lambda: print(render(summary, options.format, baseline, paper), end=""))


def _refuse_beside_compare(options: argparse.Namespace) -> None:
    for name in ("baseline", "paper", "plot", "masks", "html"):
        if getattr(options, name):
            raise ConfigError(f"--compare shows two rows alone, and goes without --{name}")
