"""What one looks at of many runs: a page, or a picture of quality over minutes.

permllm report runs --to report.html
permllm report experiments/table1/records --to result.png

The page holds the table with sort and filter, the plots, and each run's settings, time, memory and pictures; it needs no
network. The picture has a point a row and the Pareto front; its suffix, .png, .svg or .pdf, chooses the format.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from permllm.commands.answer import Answer
from permllm.errors import ConfigError, DataError
from permllm.record.files import write_text
from permllm.results.collect import collect
from permllm.results.published import Comparison, published
from permllm.results.render import find_baseline
from permllm.results.summary import close_gaps, summarise


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="runs, or directories that hold some")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="FILE.html, or FILE.png, .svg, .pdf")
    parser.add_argument("--baseline", metavar="NAME=VALUE,...", help="compare with the row that has these settings")
    parser.add_argument("--paper", metavar="TABLE", help="put the paper's numbers beside, for example table6")
    parser.add_argument("--measure", metavar="NAME", help="of the picture, for example 'average acc'; default: the main one")


def work(options: argparse.Namespace) -> Answer:
    """The file that was written."""
    collection = collect(options.directories)
    if not collection.runs:
        raise ConfigError("; ".join(["no finished run is among them", *collection.left_out()]))
    summary = summarise(collection.runs)
    if options.to.suffix == ".html":
        from permllm.results.page import page

        models = sorted({run.config["model"]["name"] for run in collection.runs})
        paper = Comparison(published(options.paper), models) if options.paper else None
        baseline = find_baseline(summary, options.baseline) if options.baseline else None
        if baseline is not None:
            close_gaps(summary, baseline)
        try:
            write_text(options.to, page(collection, summary, baseline, paper))
        except DataError as error:
            raise ConfigError(f"--to: {error}") from error
    else:
        from permllm.results.plots import plot_cost

        for note in [*collection.notes(), *summary.notes]:
            print(f"note: {note}", file=sys.stderr)
        plot_cost(summary, options.to, options.measure)
    found = {
        "file": str(options.to),
        "runs": len(collection.runs),
        "rows": len(summary.rows),
        "bytes": options.to.stat().st_size,
    }
    return Answer(found, lambda: print(f"{options.to}: {len(collection.runs)} runs, {found['bytes'] / 1e3:.0f} kB"))
