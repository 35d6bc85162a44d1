"""The tables of the paper from what runs logged to Weights & Biases: online, or from the folders that they left here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from permllm.config import evaluation_of, flatten, identity_of
from permllm.errors import ConfigError, DataError
from permllm.runs.names import SCHEMA_VERSION
from permllm.runs.published import Comparison, Published
from permllm.runs.read import Run
from permllm.runs.render import render
from permllm.runs.schema import FinishedRun, Object, Settings, validated
from permllm.runs.table import Summary, summarise

# What the logger adds to the settings that make a result.
_ADDED = ("run_directory", "config_hash")
# And to the final values: `pruning_minutes` and `nats_above_dense` of `permllm.runs.figures`.
MINUTES, NATS = "minutes", "nats_above_dense"
# JSON has no such numbers; W&B writes them as words.
_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


@dataclass
class Logged:
    """A run as W&B has it.

    Attributes:
        id: W&B's, unique in a project.
        name: of the run.
        group: of the sweep; empty for a single job.
        state: `finished`, `running`, `crashed`, `failed`.
        config: the settings that make a result, and what the logger adds.
        summary: final values by name.
        history: rows in the order in which they were logged; empty for runs that come through the Api, where those of each run
            would be a request of their own and no table needs them.
    """

    id: str
    name: str
    group: str
    state: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """The runs of one model beside the paper's numbers.

    Attributes:
        model: short name.
        summary: of its runs.
        paper: finds the published numbers.
        ids: W&B's, of the runs.
    """

    model: str
    summary: Summary
    paper: Comparison
    ids: list[str]


def read_api(api: Any, path: str, groups: list[str]) -> list[Logged]:
    """The runs of a project, the oldest first; settings and final values only of those in some groups.

    Args:
        api: `wandb.Api()`.
        path: `ENTITY/PROJECT`, or `PROJECT` of the default entity.
        groups: patterns of the groups' names (see `chosen`).

    Raises:
        DataError: W&B cannot be reached or refuses, or there is no such project.
    """
    found = []
    with asking(f"the runs of {path} cannot be had from W&B"):
        for run in api.runs(path, order="+created_at"):
            logged = Logged(run.id, run.name, run.group or "", run.state, {}, {})
            if chosen(logged.group, groups):
                # A request for each run.
                logged.config, logged.summary = dict(run.config), dict(run.summary_metrics)
            found.append(logged)
    return found


@contextmanager
def asking(failure: str) -> Iterator[None]:
    """Turn what goes wrong while W&B is asked into one line: its errors are of many classes, some of them not public."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{failure}: {error}") from error


def read_offline(directory: Path, project: str) -> list[Logged]:
    """The runs of a project that lie below a directory, the oldest first.

    A run that was interrupted has several folders, one for each attempt: they become one run here, as they do in W&B.

    Raises:
        ConfigError: there are none, or this wandb cannot print them.
    """
    # `latest-run` is a link to one of them, and "**" does not follow links.
    files = sorted(directory.rglob("run-*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-"))
    runs: dict[str, Logged] = {}
    for file in files:
        records = list(_records(file))
        header = next((record["run"] for record in records if "run" in record), None)
        if header is not None and header.get("project") == project:
            run = runs.setdefault(header["run_id"], Logged(header["run_id"], "", "", "", {}, {}))
            run.name, run.group = header.get("display_name", ""), header.get("run_group", "")
            _replay(run, records)
    if not runs:
        raise ConfigError(
            f"no runs of the project {project} below {directory}: wandb leaves DIR/wandb/offline-run-*/run-*.wandb"
        )
    return list(runs.values())


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """What a run wrote, through wandb's own command: the format of the file is not documented."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ConfigError(f"`wandb leet inspect --json` (wandb 0.31 or newer) cannot read {file}: {reason}")
    for line in result.stdout.splitlines():
        yield json.loads(line)


def _replay(run: Logged, records: Iterable[dict[str, Any]]) -> None:
    run.state = "crashed"  # without an exit
    for record in records:
        if "run" in record:
            run.config.update(record["run"].get("config", {}).get("update", {}))
        elif "config" in record:
            run.config.update(record["config"].get("update", {}))
        elif "summary" in record:
            for removed in record["summary"].get("remove", []):
                run.summary.pop(removed["key"], None)
            run.summary.update(record["summary"].get("update", {}))
        elif "history" in record:
            run.history.append(record["history"]["item"])
        elif "exit" in record:
            run.state = "failed" if record["exit"].get("exit_code") else "finished"


def chosen(group: str, patterns: list[str]) -> bool:
    """Whether a group's name matches one of some patterns, as those of file names; `*` matches single jobs too."""
    return any(fnmatchcase(group, pattern) for pattern in patterns)


def as_run(logged: Logged) -> Run:
    """A logged run as the tables take them.

    Raises:
        DataError: it is not finished, or was not logged by this framework; the message says which.
    """
    metrics = _nested(logged.summary)
    if logged.state != "finished" or metrics.get("status") != "finished":
        raise DataError(f"not finished ({logged.state})")
    if metrics.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"schema_version is {metrics.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    config = {key: value for key, value in logged.config.items() if key not in _ADDED and not key.startswith("_")}
    # What is None is not logged.
    for tasks in validated("final values: zero_shot", metrics.get("zero_shot", {}), dict[str, dict[str, Object]]).values():
        for values in tasks.values():
            for key in ("acc", "acc_norm", "stderr", "n", "split"):
                values.setdefault(key, None)
    for tasks in validated("final values: tasks", metrics.get("tasks", {}), dict[str, dict[str, Object]]).values():
        for values in tasks.values():
            values.update({"metrics": {}, "stderr": {}, "n": None, "num_fewshot": None, "split": None, "data": None} | values)
    validated("final values", metrics, FinishedRun)
    validated("settings", validated("settings", config, Object), Settings)
    metrics["evaluation"] = evaluation_of(config)
    passes = [row for row in logged.history if "lcp/pass" in row]
    # A pass that was done again counts once.
    history = {row["lcp/pass"]: {key[5:]: value for key, value in row.items() if key.startswith("pass/")} for row in passes}
    for entry in history.values():
        entry.setdefault("measured_loss", None)
    return Run(Path(str(logged.config.get("run_directory", logged.id))), config, metrics, {}, list(history.values()))


def _nested(summary: dict[str, Any]) -> dict[str, Any]:
    """Final values as in `metrics.json`. Of what is one value for each channel group there, only the mean was logged."""
    metrics: dict[str, Any] = {}
    for name, value in summary.items():
        *folders, key = name.split("/")
        if name.startswith("_") or name in (MINUTES, NATS) or (folders and folders[0] in ("lcp", "pass")):
            continue
        place = metrics
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise DataError(f"final values: {name} lies below a value")
        place[key] = _WORDS.get(value, value) if isinstance(value, str) else value
    return metrics


def tables(logged: list[Logged], paper: list[Published]) -> tuple[list[Table], list[str]]:
    """A table for each model, and notes on the runs that are in none.

    Raises:
        ConfigError: no run is finished.
    """
    notes: list[str] = []
    newest: dict[str, tuple[Run, Logged]] = {}
    for entry in logged:
        try:
            run = as_run(entry)
        except DataError as error:
            notes.append(f"skipped {entry.name} ({entry.id}): {error}")
            continue
        identity = json.dumps(identity_of(run.config), sort_keys=True)
        if identity in newest:
            # Run again with force=true: its directory holds the last one too.
            earlier = newest.pop(identity)[1]
            notes.append(f"{entry.name} ({entry.id}) has the settings of {earlier.id}, which is older and is not counted")
        newest[identity] = (run, entry)
    if not newest:
        raise ConfigError("; ".join(["no finished run is among them", *notes]))
    models: dict[str, list[tuple[Run, Logged]]] = {}
    for pair in newest.values():
        models.setdefault(pair[0].config["model"]["name"], []).append(pair)
    found = []
    for model, pairs in sorted(models.items()):
        summary = summarise([run for run, _ in pairs])
        found.append(Table(model, summary, Comparison(paper, model), [entry.id for _, entry in pairs]))
    return found, notes


def text(found: list[Table], format: str) -> str:
    """The tables in one of `FORMATS`; JSON is one list of all rows."""
    parts = [render(table.summary, format, paper=table.paper) for table in found]
    if format == "json":
        return json.dumps([row for part in parts for row in json.loads(part)], indent=2) + "\n"
    if format == "md" and len(found) > 1:
        parts = [f"## {table.model}\n\n{part}" for table, part in zip(found, parts, strict=True)]
    return "\n".join(parts)


def report(found: list[Table], project: str, entity: str, title: str) -> Any:
    """A W&B report of the tables, not saved yet.

    Below each table stand the panels of exactly the runs behind it: quality over minutes, then bars of each result and curves
    grouped by what varies, so that seeds fall together.

    Raises:
        ConfigError: the package wandb-workspaces is missing.
    """
    wr, expr = _workspaces("reports.v2"), _workspaces("expr")
    blocks: list[Any] = []
    for table in found:
        blocks += [wr.H2(table.model), wr.MarkdownBlock(render(table.summary, "md", paper=table.paper))]
        if table.paper.note:
            blocks.append(wr.P(table.paper.note))
        runs = {"entity": entity, "project": project, "filters": [expr.Metric("ID").isin(table.ids)]}
        each = wr.Runset(**runs, name=f"{table.model}, each run")
        grouped = wr.Runset(**runs, name=table.model, groupby=[f"config.{key}" for key in _varying(table.summary)])
        panels: list[Any] = [wr.BarPlot(title=name, metrics=[name], orientation="v") for name in _results(table.summary)]
        curves = {
            "loss": ("lcp/step", "lcp/loss"),
            "temperature": ("lcp/step", "lcp/temperature"),
            "loss measured after an epoch": ("lcp/pass", "pass/measured_loss"),
            "flips in an epoch": ("lcp/pass", "pass/flips"),
        }
        for name, (x, y) in curves.items():
            axis = x.removeprefix("lcp/").replace("pass", "epoch")
            panels.append(wr.LinePlot(title=name, x=x, y=[y], title_x=axis, groupby_rangefunc="stddev"))
        blocks += [wr.PanelGrid(runsets=[each], panels=_scatters(table)), wr.PanelGrid(runsets=[grouped], panels=panels)]
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid")


def workspace(found: list[Table], project: str, entity: str, title: str) -> Any:
    """A view of the project's workspace with the runs behind the tables and their quality over minutes, not saved yet."""
    ws, expr = _workspaces("workspaces"), _workspaces("expr")
    sections = [
        ws.Section(name=f"{table.model}: quality over minutes", panels=_scatters(table), is_open=True, pinned=True)
        for table in found
    ]
    runs = ws.RunsetSettings(filters=[expr.Metric("ID").isin([run_id for table in found for run_id in table.ids])])
    return ws.Workspace(entity=entity, project=project, name=title, sections=sections, runset_settings=runs)


def _scatters(table: Table) -> list[Any]:
    """Each result over minutes, with the best so far as a line: the Pareto front."""
    wr = _workspaces("reports.v2")
    panels = []
    for name in _results(table.summary):
        lower = name.startswith(("perplexity", NATS))
        line = {"running_ymin": True} if lower else {"running_ymax": True}
        log = name.startswith("perplexity")
        panels.append(wr.ScatterPlot(title=f"{name} over minutes", x=MINUTES, y=name, log_x=True, log_y=log, **line))
    return panels


def _workspaces(part: str) -> Any:
    try:
        return import_module(f"wandb_workspaces.{part}")
    except ImportError as error:
        raise ConfigError("--publish needs wandb-workspaces: pip install -e '.[wandb-report]'") from error


def _varying(summary: Summary) -> list[str]:
    """Return the keys in the W&B config of the columns of a table; a group has its own `name`."""
    # A run that has the usual one of a group leaves it out.
    recorded = {key for row in summary.rows for key in flatten(row.runs[0].config)}
    keys = [column for column in summary.settings if not column.endswith(" (digest)")]
    return [f"{key}.name" if f"{key}.name" in recorded else key for key in keys]


def _results(summary: Summary) -> list[str]:
    """Names of the final values that the table is about: perplexities, of several first their one number, then accuracies."""
    found = [row.runs[0].metrics for row in summary.rows]
    texts = [name for metrics in found for name in metrics.get("perplexity", {}).get("sparse", {})]
    names = list(dict.fromkeys(f"perplexity/sparse/{name}/value" for name in texts))
    tasks = [task for metrics in found for task in metrics.get("zero_shot", {}).get("sparse", {}).items()]
    accuracies = list(dict.fromkeys(f"zero_shot/sparse/{task}/acc" for task, values in tasks if values["acc"] is not None))
    return [NATS] * (len(names) > 1) + names + accuracies
