"""Write what a reader sees of many runs: a page, a picture, or a table of the paper from W&B.

permllm report runs --to report.html
permllm report experiments/table1 --to result.png
permllm report runs --curves curves.png
permllm report runs --masks masks.png --linear model.layers.0.mlp.down_proj
permllm report --wandb permllm --table table6
permllm report --wandb permllm --table table7 --group 'table7-*' --group 'table1-*' --publish

The page holds quality over minutes, the table with sort and filter, and of each run its settings, learning curves and
permutations; it needs no network. The picture has a point a row and the Pareto front; its suffix, .png, .svg or .pdf, chooses
the format. The option --curves draws the losses of what learned, --masks the mask of one linear under every row.

The table from W&B has the paper's numbers beside, and each model has one of its own. --publish makes a W&B report of it, with
quality over minutes; it needs `pip install -e '.[wandb-report]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from permllm.errors import ConfigError, DataError
from permllm.runs.files import write_text
from permllm.runs.render import FORMATS, beside
from permllm.runs.results_command import found_in, note
from permllm.runs.table import Table
from permllm.runtime.terminal import Answer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("places", nargs="*", type=Path, metavar="DIR", help="runs, folders that hold some, or kept records")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--to", type=Path, metavar="FILE", help="FILE.html, or FILE.png, .svg, .pdf")
    written.add_argument("--curves", type=Path, metavar="FILE.png", help="draw the losses of what learned")
    written.add_argument("--masks", type=Path, metavar="FILE.png", help="draw the mask of one linear under every row")
    parser.add_argument("--linear", metavar="PATH", help="whose mask; default: the first one of the middle layer")
    parser.add_argument("--baseline", metavar="NAME=VALUE,...", help="compare with the row that has these settings")
    parser.add_argument("--paper", metavar="TABLE", help="put the paper's numbers beside, for example table6")
    parser.add_argument("--measure", metavar="NAME", help="of the picture, for example 'average acc'; default: the main one")
    wandb = parser.add_argument_group("runs in W&B")
    wandb.add_argument("--wandb", metavar="PROJECT", help="take them from there")
    wandb.add_argument("--table", help="of the paper, for example table6")
    wandb.add_argument("--entity", help="user or team; yours without it")
    wandb.add_argument(
        "--group",
        action="append",
        metavar="SWEEP",
        help="sweeps to take the runs from, with * for anything, several times; without it those of this table's experiment",
    )
    wandb.add_argument("--format", choices=FORMATS, default="md")
    wandb.add_argument("--publish", action="store_true", help="make a W&B report")


def work(options: argparse.Namespace) -> Answer:
    """Return what was written, or the tables."""
    file = options.to or options.curves or options.masks
    if options.wandb:
        from permllm.runs.wandb_report import answer as of_wandb

        if options.places or file or not options.table:
            raise ConfigError("--wandb goes with --table, and without DIR, --to, --curves and --masks")
        return of_wandb(options)
    if not options.places or not file:
        raise ConfigError("DIR... and one of --to, --curves and --masks are needed, or --wandb PROJECT and --table")
    page = file == options.to and file.suffix == ".html"
    used = {"paper": page, "measure": options.to and not page, "baseline": options.to, "linear": options.masks}
    for option, is_used in used.items():
        if (value := getattr(options, option)) and not is_used:
            raise ConfigError(f"--{option} {value}: {file} shows nothing of it")
    found = found_in(options.places)
    table = Table(found.runs, options.baseline)
    # What draws takes longer to import than a table takes.
    if page:
        from permllm.runs.page import page as page_of

        try:
            write_text(file, page_of(table, found.notes, beside(options.paper, table)))
        except DataError as error:
            raise ConfigError(f"--to: {error}") from error
    else:
        from permllm.runs.plots import plot_cost, plot_curves, plot_masks

        note(table.notes)
        if options.to:
            plot_cost(table, file, options.measure)
        elif options.curves:
            plot_curves(table, file)
        else:
            plot_masks(table, file, options.linear)
    runs, size = len(table.runs), file.stat().st_size
    answer = {"file": str(file), "runs": runs, "rows": len(table.rows), "bytes": size}
    return Answer(answer, lambda: print(f"{file}: {runs} runs, {size / 1e3:.0f} kB"))
