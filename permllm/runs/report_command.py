"""Write what a reader sees of many runs: a page, a picture, or a table of the paper from W&B.

permllm report runs --to report.html
permllm report experiments/table1 --to result.png
permllm report runs --curves curves.png
permllm report runs --masks masks.png --linear model.layers.0.mlp.down_proj
permllm report --wandb permllm --table table6
permllm report --wandb permllm --table table7 --group 'table7-*' --group 'table1-*' --publish
permllm report --offline runs --table table6

The page holds the table with sort and filter, the plots, and each run's settings, time, memory and pictures; it needs no
network. The picture has a point a row and the Pareto front; its suffix, .png, .svg or .pdf, chooses the format. The option
--curves draws the losses of what learned, --masks the mask of one linear under every row.

The table has the paper's numbers beside, and each model has one of its own. --offline reads what runs left on this machine,
sent or not (wandb 0.31 or newer). --publish makes a W&B report of it, and a view of the project's workspace, with quality over
minutes, bars and curves of the runs behind it; it needs `pip install -e '.[wandb-report]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from permllm.errors import ConfigError, DataError
from permllm.runs.files import write_text
from permllm.runs.published import Comparison, beside, published
from permllm.runs.read import Collection, collect
from permllm.runs.render import FORMATS, records, take_baseline, undrawn
from permllm.runs.table import Row, Summary, summarise
from permllm.runtime.terminal import Answer


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIR", help="runs, directories that hold some, or files of records"
    )
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
    wandb.add_argument("--offline", type=Path, metavar="DIR", help="from the folders below DIR (of the project permllm)")
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
    """What was written, or the tables."""
    file = options.to or options.curves or options.masks
    if options.wandb or options.offline:
        if options.directories or file or not options.table:
            raise ConfigError("--wandb and --offline go with --table, and without DIR, --to, --curves and --masks")
        return _of_wandb(options)
    if not options.directories or not file:
        raise ConfigError("DIR... and one of --to, --curves and --masks are needed, or --wandb PROJECT and --table")
    page = file == options.to and file.suffix == ".html"
    used = {"paper": page, "measure": options.to and not page, "baseline": options.to, "linear": options.masks}
    for option, is_used in used.items():
        if (value := getattr(options, option)) and not is_used:
            raise ConfigError(f"--{option} {value}: {file} shows nothing of it")
    return _drawn(options, file, page)


def _drawn(options: argparse.Namespace, file: Path, page: bool) -> Answer:
    collection = collect(options.directories)
    if not collection.runs:
        raise ConfigError("; ".join(["no finished run is among them", *collection.left_out()]))
    summary = summarise(collection.runs)
    baseline = take_baseline(summary, options.baseline)
    if page:
        _write_page(file, collection, summary, baseline, beside(options.paper, collection.runs))
    else:
        from permllm.runs.plots import plot_cost, plot_curves, plot_masks

        _note([*collection.left_out(), *summary.notes, *(undrawn(summary, options.measure) if options.to else [])])
        if options.to:
            plot_cost(summary, file, options.measure)
        elif options.curves:
            plot_curves(summary, file)
        else:
            plot_masks(summary, file, options.linear)
    runs, size = len(collection.runs), file.stat().st_size
    found = {"file": str(file), "runs": runs, "rows": len(summary.rows), "bytes": size}
    return Answer(found, lambda: print(f"{file}: {runs} runs, {size / 1e3:.0f} kB"))


def _write_page(file: Path, collection: Collection, summary: Summary, baseline: Row | None, paper: Comparison | None) -> None:
    from permllm.runs.page import page  # what draws takes longer to import than a table takes

    try:
        write_text(file, page(collection, summary, baseline, paper))
    except DataError as error:
        raise ConfigError(f"--to: {error}") from error


def _of_wandb(options: argparse.Namespace) -> Answer:
    from permllm.runs.wandb_report import asking, chosen, read_api, read_offline, report, tables, text, workspace

    if options.publish and options.offline:
        raise ConfigError("--publish makes a report of runs that W&B has: `wandb sync` them first, and leave out --offline")
    table = f"table{options.table.removeprefix('table')}"
    try:
        paper = published(table)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--paper", "--table")) from error
    project, groups, entity = options.wandb or "permllm", options.group or [table, f"{table}-*"], options.entity
    if options.offline:
        logged = read_offline(options.offline, project)
    else:
        with asking("W&B cannot be reached"):
            import wandb

            api = wandb.Api()
            entity = entity or api.default_entity
        logged = read_api(api, f"{entity}/{project}" if entity else project, groups)
    of_groups = [run for run in logged if chosen(run.group, groups)]
    if not of_groups:
        there = ", ".join(sorted({run.group for run in logged if run.group})) or "none"
        raise ConfigError(f"no run is in the group {' or '.join(groups)}; groups are {there}; --group '*' takes all runs")
    found, notes = tables(of_groups, paper)
    _note([*notes, *(one.paper.note for one in found if one.paper.note)])
    urls = []
    if options.publish:
        if not entity:
            raise ConfigError("--publish needs --entity: this key has no default one")
        for make in (report, workspace):
            with asking(f"the {make.__name__} cannot be saved"):
                urls.append(make(found, project, entity, f"PermLLM, {table}").save().url)
    rows = [row for one in found for row in records(one.summary, paper=one.paper)]
    shown = "".join([text(found, options.format), *(f"{url}\n" for url in urls)])
    return Answer({"rows": rows, "urls": urls}, lambda: print(shown, end=""))


def _note(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
