"""What a reader sees of many runs: a page, a picture of quality over minutes, or a table of the paper from W&B.

permllm report runs --to report.html
permllm report experiments/table1 --to result.png
permllm report --wandb permllm --table table6
permllm report --wandb permllm --table table7 --group 'table7-*' --group 'table1-*' --publish
permllm report --offline runs --table table6

The page holds the table with sort and filter, the plots, and each run's settings, time, memory and pictures; it needs no
network. The picture has a point a row and the Pareto front; its suffix, .png, .svg or .pdf, chooses the format.

The table has the paper's numbers beside, and each model has one of its own. --offline reads what runs left on this machine,
sent or not (wandb 0.31 or newer). --publish makes a W&B report of it, and a view of the project's workspace, with quality over
minutes, bars and curves of the runs behind it; it needs `pip install -e '.[wandb-report]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from permllm.commands.answer import Answer
from permllm.errors import ConfigError, DataError
from permllm.record.files import write_text
from permllm.results.collect import Collection, collect
from permllm.results.published import Comparison, beside, published
from permllm.results.render import FORMATS, records, take_baseline, undrawn
from permllm.results.summary import Row, Summary, summarise


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIR", help="runs, directories that hold some, or files of records"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="FILE.html, or FILE.png, .svg, .pdf")
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
    if options.wandb or options.offline:
        if options.directories or options.to or not options.table:
            raise ConfigError("--wandb and --offline go with --table, and without DIR and --to")
        return _of_wandb(options)
    if not options.directories or not options.to:
        raise ConfigError("DIR... and --to FILE are needed, or --wandb PROJECT and --table")
    page = options.to.suffix == ".html"
    if ignored := options.measure if page else options.paper:
        option, kind = ("--measure", "a picture") if page else ("--paper", "a page")
        raise ConfigError(f"{option} {ignored}: it is of {kind}, and --to {options.to} is none")
    return _drawn(options)


def _drawn(options: argparse.Namespace) -> Answer:
    collection = collect(options.directories)
    if not collection.runs:
        raise ConfigError("; ".join(["no finished run is among them", *collection.left_out()]))
    summary = summarise(collection.runs)
    baseline = take_baseline(summary, options.baseline)
    if options.to.suffix == ".html":
        write_page("--to", options.to, collection, summary, baseline, beside(options.paper, collection.runs))
    else:
        from permllm.results.plots import plot_cost

        _note([*collection.left_out(), *summary.notes, *undrawn(summary, options.measure)])
        plot_cost(summary, options.to, options.measure)
    found = {
        "file": str(options.to),
        "runs": len(collection.runs),
        "rows": len(summary.rows),
        "bytes": options.to.stat().st_size,
    }
    return Answer(found, lambda: print(f"{options.to}: {len(collection.runs)} runs, {found['bytes'] / 1e3:.0f} kB"))


def write_page(
    option: str, file: Path, collection: Collection, summary: Summary, baseline: Row | None, paper: Comparison | None
) -> None:
    """Write the page. Raises ConfigError, which names the option that asked for it, where the file cannot be written."""
    from permllm.results.page import page  # what draws takes longer to import than a table takes

    try:
        write_text(file, page(collection, summary, baseline, paper))
    except DataError as error:
        raise ConfigError(f"{option}: {error}") from error


def _of_wandb(options: argparse.Namespace) -> Answer:
    from permllm.results.wandb_runs import asking, chosen, read_api, read_offline, report, tables, text, workspace

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
