"""Write what a reader sees of many runs: a page, a picture, or a table of the paper from W&B.

permllm report runs --to report.html
permllm report experiments/table1 --to result.png
permllm report runs --curves curves.png
permllm report runs --masks masks.png --linear model.layers.0.mlp.down_proj
permllm report --wandb permllm --table table6
permllm report --wandb permllm --table table7 --group 'table7-*' --group 'table1-*' --publish

The page holds quality over minutes, the table with sort and filter, and of each run its settings,
learning curves and permutations; it needs no network. The picture has a point a row and the Pareto
front; its suffix, .png, .svg or .pdf, chooses the format. The option --curves draws the losses of
what learned, --masks the mask of one linear under every row.

The table from W&B has the paper's numbers beside, and each model has one of its own. --publish
makes a W&B report of it, with quality over minutes; it needs `pip install -e '.[wandb-report]'`.
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
from permllm.runs.compare import Comparison, published
from permllm.runs.files import write_text
from permllm.runs.read import Collection, Run
from permllm.runs.render import FORMATS, beside, records, render
from permllm.runs.results_command import BASELINE, PAPER, PLACES, found_in, note
from permllm.runs.table import Table
from permllm.runtime.identity import evaluation_of
from permllm.runtime.terminal import Answer

# The logger adds these to the settings.
_ADDED = ("run_directory", "config_hash")
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
    add("--measure", metavar="NAME", help="of the picture, such as 'average acc'")
    add("--wandb", metavar="PROJECT", help="take the runs from W&B")
    add("--table", help="of the paper, for example table6, with --wandb")
    add("--entity", help="user or team in W&B; yours without it")
    add("--group", action="append", metavar="SWEEP", help=group)
    add("--format", choices=FORMATS, default="md", help="of the table from W&B")
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

        write_text(file, page(table, found.notes, beside(options.paper, table)))
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
    """Return a table for each model of a project, and the address of their W&B report."""
    name = f"table{options.table.removeprefix('table')}"
    paper, groups = published(name), options.group or [name, f"{name}-*"]
    with _asking(f"the runs of {options.wandb} cannot be had from W&B"):
        import wandb

        api = wandb.Api()
        entity = options.entity or api.default_entity
        project = f"{entity}/{options.wandb}" if entity else options.wandb
        logged = list(api.runs(project, order="-created_at"))
    found = Collection()
    for one in logged:
        if any(fnmatchcase(one.group or "", pattern) for pattern in groups):
            try:
                found.add(
                    as_run(one)
                )  # the newest first: done again with force=true it counts once
            except (AttributeError, DataError, TypeError) as error:  # a run of others
                found.notes.append(f"skipped {one.name} ({one.id}): {error}")
    note(found.notes)
    if not found.runs:
        there = ", ".join(sorted({run.group for run in logged if run.group})) or "none"
        wanted = " or ".join(groups)
        raise ConfigError(f"--group {wanted}: no finished run; groups are {there}, or * for all")
    tables: dict[str, tuple[Table, Comparison]] = {}
    for model in sorted({str(run.config["model"]["name"]) for run in found.runs}):
        runs = [run for run in found.runs if run.config["model"]["name"] == model]
        tables[model] = (Table(runs), Comparison(paper, model))
    note([compared.note for _, compared in tables.values() if compared.note])
    urls = [_published(tables, options, entity, f"PermLLM, {name}")] if options.publish else []
    rows = [row for table, compared in tables.values() for row in records(table, compared)]
    texts = []
    for model, (table, compared) in tables.items():
        heading = f"## {model}\n\n" if options.format == "md" and len(tables) > 1 else ""
        texts.append(heading + render(table, options.format, compared))
    shown = "\n".join(texts) + "".join(f"{url}\n" for url in urls)
    return Answer({"rows": rows, "urls": urls}, lambda: print(shown, end=""))


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
    logged_config = {key: value for key, value in logged.config.items() if not key.startswith("_")}
    config = {key: value for key, value in logged_config.items() if key not in _ADDED}
    metrics["evaluation"] = evaluation_of(config)
    directory = Path(str(logged_config.get("run_directory", logged.id)))
    return Run(directory, config, metrics, [metrics], {"wandb_id": logged.id})


def _published(
    tables: dict[str, tuple[Table, Comparison]],
    options: argparse.Namespace,
    entity: str | None,
    title: str,
) -> str:
    """Save a W&B report of the tables, with the results over minutes, and return its address."""
    if not entity:
        raise ConfigError("--publish needs --entity: this key has no default one")
    try:
        wr = import_module("wandb_workspaces.reports.v2")
        expr = import_module("wandb_workspaces.expr")
    except ImportError as error:
        raise ConfigError("--publish needs: pip install -e '.[wandb-report]'") from error
    project, blocks = {"entity": entity, "project": options.wandb}, list[Any]()
    for model, (table, compared) in tables.items():
        perplexities = [run.metrics.get("perplexity", {}).get("sparse", {}) for run in table.runs]
        texts = dict.fromkeys(text for of_run in perplexities for text in of_run)
        names = ["nats_above_dense"] * bool(texts)
        names += [f"perplexity/sparse/{text}/value" for text in texts]
        look = {"x": "minutes", "log_x": True, "running_ymin": True}
        panels = [wr.ScatterPlot(title=f"{name} over minutes", y=name, **look) for name in names]
        ids = [run.environment["wandb_id"] for run in table.runs]
        runs = wr.Runset(**project, name=model, filters=[expr.Metric("ID").isin(ids)])
        blocks += [wr.H2(model), wr.MarkdownBlock(render(table, "md", compared))]
        blocks += [wr.P(compared.note), wr.PanelGrid(runsets=[runs], panels=panels)]
    with _asking("the report cannot be saved"):
        return str(wr.Report(**project, title=title, blocks=blocks, width="fluid").save().url)
