"""Write what a reader sees of many runs: a page, a picture, or a table of the paper from W&B.

permllm report runs --to report.html
permllm report experiments/table1 --to result.png
permllm report runs --curves curves.png
permllm report runs --masks masks.png --linear model.layers.0.mlp.down_proj
permllm report --wandb permllm --table table6
permllm report --wandb permllm --table table7 --group 'table7-*' --group 'table1-*' --publish

The page holds quality over minutes and the table with sort and filter; it needs no network. The
picture has a point a row and the Pareto front; its suffix, .png, .svg or .pdf, chooses the format.
The option --curves draws the losses of what learned, --masks the mask of one linear under every
row.

The table from W&B has the paper's numbers beside. --publish makes a W&B report of it, with the
log-perplexity above the dense model's over minutes; it needs `pip install -e '.[wandb-report]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError, DataError
from permllm.runs.compare import published
from permllm.runs.files import write_text
from permllm.runs.read import LACKS, Collection, Run
from permllm.runs.render import beside, records, render
from permllm.runs.results_command import BASELINE, PAPER, PLACES, found_in, note
from permllm.runs.table import Table
from permllm.runtime.identity import evaluation_of
from permllm.runtime.terminal import Answer

# W&B writes as words what JSON has not.
_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add, written = parser.add_argument, parser.add_mutually_exclusive_group()
    group = "sweeps to take the runs from, with * for anything, several times; default: the table's"
    add("places", nargs="*", type=Path, metavar="DIR", help=PLACES)
    for option, what in {
        "--to": "the page, FILE.html, or quality over minutes, FILE.png, .svg, .pdf",
        "--curves": "draw the losses of what learned",
        "--masks": "draw the mask of one linear under every row",
    }.items():
        written.add_argument(option, type=Path, metavar="FILE", help=what)
    add("--linear", metavar="PATH", help="whose mask; default: the first of the middle layer")
    add("--baseline", metavar="NAME=VALUE,...", help=BASELINE)
    add("--paper", metavar="TABLE", help=f"of the page: {PAPER}")
    add("--measure", metavar="NAME", help="to draw over minutes, such as 'average acc'")
    add("--wandb", metavar="PROJECT", help="take the runs from W&B")
    add("--table", help="of the paper, for example table6, with --wandb")
    add("--entity", help="user or team in W&B; yours without it")
    add("--group", action="append", metavar="SWEEP", help=group)
    add("--publish", action="store_true", help="make a W&B report of it")


def work(options: argparse.Namespace) -> Answer:
    """Return what was written, or the tables."""
    file = options.to or options.curves or options.masks
    if options.wandb and options.table and not options.places and not file:
        return _of_wandb(options)
    if options.wandb or not options.places or not file:
        raise ConfigError("expected DIR... and one of --to, --curves, --masks; or --wandb, --table")
    found = found_in(options.places)
    table = Table(found.runs, options.baseline)
    # What draws takes longer to import than a table takes.
    if file == options.to and file.suffix == ".html":
        from permllm.runs.page import page

        paper = beside(options.paper, table)
        write_text(file, page(table, found.notes, paper, options.measure))
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


def _of_wandb(options: argparse.Namespace) -> Answer:
    """Return the table of a project's runs, and the address of its W&B report."""
    published(options.table)  # refuses a table that the paper does not have
    groups = options.group or [options.table, f"{options.table}-*"]
    with _asking(f"the runs of {options.wandb} cannot be had from W&B"):
        import wandb

        api = wandb.Api()
        entity = options.entity or api.default_entity
        project = f"{entity}/{options.wandb}" if entity else options.wandb
        logged = list(api.runs(project, order="-created_at"))
    found = Collection()
    # The newest first: a run that was done again with force=true counts once.
    for one in logged:
        if any(fnmatchcase(one.group or "", pattern) for pattern in groups):
            try:
                found.add(as_run(one))
            except (DataError, *LACKS) as error:  # a run of others
                found.notes.append(f"skipped {one.name} ({one.id}): {error}")
    note(found.notes)
    if not found.runs:
        there = ", ".join(sorted({run.group for run in logged if run.group})) or "none"
        wanted = " or ".join(groups)
        raise ConfigError(f"--group {wanted}: no finished run; groups are {there}, or * for all")
    table = Table(found.runs)
    paper = beside(options.table, table)
    text = render(table, "md", paper)
    url = _published(table, text, options, entity) if options.publish else None
    note([paper.note] if paper and paper.note else [])
    shown = text if url is None else f"{text}{url}\n"
    return Answer({"rows": records(table, paper), "url": url}, lambda: print(shown, end=""))


@contextmanager
def _asking(failure: str) -> Iterator[None]:
    """Turn an error of W&B into one line: some of its classes are not public."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{failure}: {error}") from error


def as_run(logged: Any) -> Run:
    """Return a run of `wandb.Api` as tables take them.

    Raises DataError where it is not finished or not of this framework.
    """
    if logged.state != "finished":
        raise DataError(f"not finished ({logged.state})")
    metrics: dict[str, Any] = {}
    for name, value in dict(logged.summary_metrics).items():
        place: Any = metrics
        *folders, key = name.split("/")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[key] = _WORDS.get(value, value) if isinstance(value, str) else value
    missing = {"n": None, "num_fewshot": None, "split": None}  # what is None is not logged
    for tasks in metrics.get("tasks", {}).values():
        for task, values in tasks.items():
            tasks[task] = {"metrics": {}, "stderr": {}} | missing | values
    config = {key: value for key, value in logged.config.items() if not key.startswith("_")}
    directory = Path(config.pop("run_directory"))
    del config["config_hash"]
    metrics["evaluation"] = evaluation_of(config)
    return Run(directory, config, metrics, [metrics], {"wandb_id": logged.id})


def _published(table: Table, text: str, options: argparse.Namespace, entity: str | None) -> str:
    """Save a W&B report with the table and the gap over minutes, and return its address."""
    if not entity:
        raise ConfigError("--publish needs --entity: this key has no default one")
    try:
        wr = import_module("wandb_workspaces.reports.v2")
        expr = import_module("wandb_workspaces.expr")
    except ImportError as error:
        raise ConfigError("--publish needs: pip install -e '.[wandb-report]'") from error
    project, title = {"entity": entity, "project": options.wandb}, f"PermLLM, {options.table}"
    ids = [run.environment["wandb_id"] for run in table.runs]
    runs = wr.Runset(**project, filters=[expr.Metric("ID").isin(ids)])
    gap = wr.ScatterPlot(x="minutes", y="nats_above_dense", log_x=True, running_ymin=True)
    blocks = [wr.MarkdownBlock(text), wr.PanelGrid(runsets=[runs], panels=[gap])]
    with _asking("the report cannot be saved"):
        return str(wr.Report(**project, title=title, blocks=blocks, width="fluid").save().url)
