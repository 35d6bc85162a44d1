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

from permllm.config import evaluation_of
from permllm.errors import ConfigError, DataError
from permllm.runs.files import write_text
from permllm.runs.published import Comparison, published
from permllm.runs.read import Run, copied
from permllm.runs.render import FORMATS, as_json, beside, records, render
from permllm.runs.results_command import found_in, note
from permllm.runs.table import Table
from permllm.runtime.terminal import Answer

# The logger adds these to the settings, and names that are not in `metrics.json` to the final
# values.
_ADDED = ("run_directory", "config_hash")
_NATS, _MINUTES = "nats_above_dense", "minutes"
# W&B writes as words what JSON has not.
_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "places",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="runs, folders that hold some, or kept records",
    )
    written = parser.add_mutually_exclusive_group()
    written.add_argument(
        "--to", type=Path, metavar="FILE", help="FILE.html, or FILE.png, .svg, .pdf"
    )
    written.add_argument(
        "--curves", type=Path, metavar="FILE.png", help="draw the losses of what learned"
    )
    written.add_argument(
        "--masks", type=Path, metavar="FILE.png", help="draw the mask of one linear under every row"
    )
    parser.add_argument(
        "--linear", metavar="PATH", help="whose mask; default: the first one of the middle layer"
    )
    parser.add_argument(
        "--baseline", metavar="NAME=VALUE,...", help="compare with the row that has these settings"
    )
    parser.add_argument(
        "--paper", metavar="TABLE", help="put the paper's numbers beside, for example table6"
    )
    parser.add_argument(
        "--measure",
        metavar="NAME",
        help="of the picture, for example 'average acc'; default: the main one",
    )
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
        if options.places or file or not options.table:
            raise ConfigError(
                "--wandb goes with --table, and without DIR, --to, --curves and --masks"
            )
        return _of_wandb(options)
    if not options.places or not file:
        raise ConfigError(
            "DIR... and one of --to, --curves and --masks are needed, or --wandb PROJECT and --table"
        )
    page = file == options.to and file.suffix == ".html"
    used = {
        "paper": page,
        "measure": options.to and not page,
        "baseline": options.to,
        "linear": options.masks,
    }
    for option, is_used in used.items():
        if (value := getattr(options, option)) and not is_used:
            raise ConfigError(f"--{option} {value}: {file} shows nothing of it")
    found = found_in(options.places)
    table = Table(found.runs, options.baseline)
    # What draws takes longer to import than a table takes.
    if page:
        from permllm.runs.page import page as page_of

        write_text(file, page_of(table, found.notes, beside(options.paper, table)))
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
    """Return a table for each model of the runs of a project, and the address of their W&B report."""
    name = f"table{options.table.removeprefix('table')}"
    paper, groups = published(name), options.group or [name, f"{name}-*"]
    with _asking(f"the runs of {options.wandb} cannot be had from W&B"):
        import wandb

        api = wandb.Api()
        entity = options.entity or api.default_entity
        logged = list(
            api.runs(f"{entity}/{options.wandb}" if entity else options.wandb, order="+created_at")
        )
    of_groups = [
        run for run in logged if any(fnmatchcase(run.group or "", pattern) for pattern in groups)
    ]
    if not of_groups:
        there = ", ".join(sorted({run.group for run in logged if run.group})) or "none"
        raise ConfigError(
            f"no run is in the group {' or '.join(groups)}; groups are {there}; --group '*' takes all runs"
        )
    newest: dict[str, tuple[str, Run]] = {}
    for one in of_groups:
        try:
            run = as_run(one)
        except (AttributeError, DataError, TypeError) as error:  # a project has runs of others too
            note([f"skipped {one.name} ({one.id}): {error}"])
            continue
        # A run that was done again with force=true counts once, the last time.
        if older := newest.pop(run.key(), None):
            note(
                [
                    f"{one.name} ({one.id}) has the settings of {older[0]}, which is older and is not counted"
                ]
            )
        newest[run.key()] = (one.id, run)
    if not newest:
        raise ConfigError("no finished run is among them")
    models: dict[str, dict[str, Run]] = {}
    for number, run in newest.values():
        models.setdefault(str(run.config["model"]["name"]), {})[number] = run
    tables = {
        model: (Table([*runs.values()]), Comparison(paper, model), [*runs])
        for model, runs in sorted(models.items())
    }
    note([compared.note for _, compared, _ in tables.values() if compared.note])
    urls = (
        [_published(tables, options.wandb, entity, f"PermLLM, {name}")] if options.publish else []
    )
    rows = [row for table, compared, _ in tables.values() for row in records(table, compared)]
    texts = {
        model: render(table, options.format, compared)
        for model, (table, compared, _) in tables.items()
    }
    several = options.format == "md" and len(texts) > 1
    shown = "\n".join(f"## {model}\n\n{text}" if several else text for model, text in texts.items())
    shown = as_json(rows) if options.format == "json" else shown
    return Answer(
        {"rows": rows, "urls": urls},
        lambda: print(shown, *(f"{url}\n" for url in urls), sep="", end=""),
    )


@contextmanager
def _asking(failure: str) -> Iterator[None]:
    """Turn an error of W&B into one line: its errors are of many classes, some of them not public."""
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
    for tasks in metrics.get("tasks", {}).values():
        for values in tasks.values():  # what is None is not logged
            values.update(
                {"metrics": {}, "stderr": {}, "n": None, "num_fewshot": None, "split": None}
                | values
            )
    config = {
        key: value
        for key, value in logged.config.items()
        if key not in _ADDED and not key.startswith("_")
    }
    metrics["evaluation"] = evaluation_of(config)
    return Run(
        Path(str(logged.config.get("run_directory", logged.id))), config, metrics, copied(metrics)
    )


def _published(
    tables: dict[str, tuple[Table, Comparison, list[str]]],
    project: str,
    entity: str | None,
    title: str,
) -> str:
    """Save a W&B report of the tables, each with the results of its runs over minutes, and return its address."""
    if not entity:
        raise ConfigError("--publish needs --entity: this key has no default one")
    try:
        wr, expr = (
            import_module("wandb_workspaces.reports.v2"),
            import_module("wandb_workspaces.expr"),
        )
    except ImportError as error:
        raise ConfigError(
            "--publish needs wandb-workspaces: pip install -e '.[wandb-report]'"
        ) from error
    blocks: list[Any] = []
    for model, (table, compared, ids) in tables.items():
        texts = dict.fromkeys(
            text
            for run in table.runs
            for text in run.metrics.get("perplexity", {}).get("sparse", {})
        )
        names = [_NATS] * bool(texts) + [f"perplexity/sparse/{text}/value" for text in texts]
        look = {"x": _MINUTES, "log_x": True, "running_ymin": True}
        panels = [wr.ScatterPlot(title=f"{name} over minutes", y=name, **look) for name in names]
        runs = wr.Runset(
            entity=entity, project=project, name=model, filters=[expr.Metric("ID").isin(ids)]
        )
        blocks += [
            wr.H2(model),
            wr.MarkdownBlock(render(table, "md", compared)),
            wr.P(compared.note),
        ]
        blocks += [wr.PanelGrid(runsets=[runs], panels=panels)]
    with _asking("the report cannot be saved"):
        report = wr.Report(
            project=project, entity=entity, title=title, blocks=blocks, width="fluid"
        )
        return str(report.save().url)
