"""The tables of the paper from what runs logged to Weights & Biases, and a report of them there."""

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
from permllm.runs.published import Comparison, published
from permllm.runs.read import Run, copied
from permllm.runs.render import as_json, records, render
from permllm.runs.results_command import note
from permllm.runs.table import Table
from permllm.runtime.terminal import Answer

# The logger adds these to the settings, and names that are not in `metrics.json` to the final values.
_ADDED = ("run_directory", "config_hash")
_NATS, _MINUTES = "nats_above_dense", "minutes"
# W&B writes as words what JSON has not.
_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def answer(options: argparse.Namespace) -> Answer:
    """Return a table for each model of the runs of a project, and the address of their W&B report."""
    name = f"table{options.table.removeprefix('table')}"
    paper, groups = published(name), options.group or [name, f"{name}-*"]
    with _asking("W&B cannot be reached"):
        import wandb

        api = wandb.Api()
        entity = options.entity or api.default_entity
    ids: dict[str, dict[str, Run]] = {}
    project = f"{entity}/{options.wandb}" if entity else options.wandb
    with _asking(f"the runs of {project} cannot be had from W&B"):
        logged = list(api.runs(project, order="+created_at"))
    of_groups = [run for run in logged if any(fnmatchcase(run.group or "", pattern) for pattern in groups)]
    if not of_groups:
        there = ", ".join(sorted({run.group for run in logged if run.group})) or "none"
        raise ConfigError(f"no run is in the group {' or '.join(groups)}; groups are {there}; --group '*' takes all runs")
    for one in of_groups:
        try:
            run = as_run(one)
        except (AttributeError, DataError, TypeError) as error:  # a project has runs of others too
            note([f"skipped {one.name} ({one.id}): {error}"])
            continue
        # A run that was done again with force=true counts once, the last time.
        newest = ids.setdefault(str(run.config["model"]["name"]), {})
        newest |= {one.id: run}
        for key in [key for key, other in newest.items() if key != one.id and other.identity == run.identity]:
            note([f"{one.name} ({one.id}) has the settings of {key}, which is older and is not counted"])
            del newest[key]
    if not any(ids.values()):
        raise ConfigError("no finished run is among them")
    tables = {model: (Table([*runs.values()]), Comparison(paper, model), [*runs]) for model, runs in sorted(ids.items())}
    note([compared.note for _, compared, _ in tables.values() if compared.note])
    urls = [_published(tables, options.wandb, entity, f"PermLLM, {name}")] if options.publish else []
    rows = [row for table, compared, _ in tables.values() for row in records(table, compared)]
    texts = {model: render(table, options.format, compared) for model, (table, compared, _) in tables.items()}
    if options.format == "md" and len(texts) > 1:
        texts = {model: f"## {model}\n\n{text}" for model, text in texts.items()}
    shown = as_json(rows) if options.format == "json" else "\n".join(texts.values())
    return Answer({"rows": rows, "urls": urls}, lambda: print(shown, *(f"{url}\n" for url in urls), sep="", end=""))


@contextmanager
def _asking(failure: str) -> Iterator[None]:
    """Turn an error of W&B into one line: its errors are of many classes, some of them not public."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{failure}: {error}") from error


def as_run(logged: Any) -> Run:
    """Return a run of `wandb.Api` as tables take them. Raises DataError where it is not finished or not of this framework."""
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
            values.update({"metrics": {}, "stderr": {}, "n": None, "num_fewshot": None, "split": None} | values)
    config = {key: value for key, value in logged.config.items() if key not in _ADDED and not key.startswith("_")}
    metrics["evaluation"] = evaluation_of(config)
    return Run(Path(str(logged.config.get("run_directory", logged.id))), config, metrics, copied(metrics))


def _published(tables: dict[str, tuple[Table, Comparison, list[str]]], project: str, entity: str | None, title: str) -> str:
    """Save a W&B report of the tables, each with the results of its runs over minutes, and return its address."""
    if not entity:
        raise ConfigError("--publish needs --entity: this key has no default one")
    try:
        wr, expr = import_module("wandb_workspaces.reports.v2"), import_module("wandb_workspaces.expr")
    except ImportError as error:
        raise ConfigError("--publish needs wandb-workspaces: pip install -e '.[wandb-report]'") from error
    blocks: list[Any] = []
    for model, (table, compared, ids) in tables.items():
        texts = dict.fromkeys(text for run in table.runs for text in run.metrics.get("perplexity", {}).get("sparse", {}))
        names = [_NATS] * bool(texts) + [f"perplexity/sparse/{text}/value" for text in texts]
        look = {"x": _MINUTES, "log_x": True, "running_ymin": True}
        panels = [wr.ScatterPlot(title=f"{name} over minutes", y=name, **look) for name in names]
        runs = wr.Runset(entity=entity, project=project, name=model, filters=[expr.Metric("ID").isin(ids)])
        blocks += [wr.H2(model), wr.MarkdownBlock(render(table, "md", compared)), wr.P(compared.note)]
        blocks += [wr.PanelGrid(runsets=[runs], panels=panels)]
    with _asking("the report cannot be saved"):
        report = wr.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid")
        return str(report.save().url)
