"""Command `permllm report`: a page or a picture of many runs, or a table of the runs in W&B."""

import argparse
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from permllm.command import Answer
from permllm.errors import ConfigError, DataError
from permllm.report.published import TABLES, Comparison
from permllm.report.read import Run, collect, skipping, without_repeated
from permllm.report.render import markdown, records, table_cells, texts
from permllm.report.results_command import BASELINE, PLACES, note
from permllm.report.table import notes as notes_of
from permllm.report.table import table_of
from permllm.settings.config import evaluation_of
from permllm.settings.values import nested
from permllm.store.files import RECORD, write_text

# W&B writes numbers that JSON does not have as words.
_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Write a page or a picture of many runs, or print a table of the paper from the runs in W&B.

    permllm report runs --to report.html
    permllm report experiments/table1 --to result.png
    permllm report --wandb permllm --table table6
    permllm report --wandb permllm --table table7 --group 'table7-*' --group 'table1-*'

    The page shows quality over minutes, and the table, which can be sorted and searched. It needs
    no network. The picture has a point for each row, and the Pareto front. Its suffix, .png, .svg
    or .pdf, sets the format.

    The table from W&B has the paper's numbers beside ours.
    """
    add = parser.add_argument
    add("places", nargs="*", type=Path, metavar="DIR", help=PLACES)
    written = "write the page (FILE.html) or quality over minutes (FILE.png, .svg, .pdf)"
    add("--to", type=Path, metavar="FILE", help=written)
    add("--baseline", metavar="NAME=VALUE,...", help=BASELINE)
    add("--metric", metavar="NAME", help="metric to draw over minutes, such as 'average acc'")
    add("--wandb", metavar="PROJECT", help="read the runs from this project in W&B")
    add(
        "--table",
        choices=TABLES,
        metavar="TABLE",
        help="table of the paper for --wandb, such as table6",
    )
    add("--entity", help="user or team in W&B; default: yours")
    add(
        "--group",
        action="append",
        metavar="SWEEP",
        help="sweep of the runs in W&B, * fits anything; can be repeated; default: the table's",
    )


def work(options: argparse.Namespace) -> Answer:
    """Write a file and return its path, or return a table from W&B."""
    if options.wandb and options.table:
        return _of_wandb(options)
    file: Path = options.to
    if not options.places or not file:
        raise ConfigError("expected DIR... and --to; or --wandb and --table")
    # The libraries for drawing take seconds to import.
    from permllm.report import plots

    collection = collect(options.places)
    table = table_of(collection.runs, options.baseline)
    metric = plots.drawn_metric(table, options.metric)
    notes = collection.notes + notes_of(table, table.usual) + plots.undrawn(table, metric)
    if file.suffix == ".html":
        from permllm.report.page import page

        write_text(file, page(table, notes, metric))
    else:
        plots.plot_cost(table, file, metric)
    note(notes)
    runs = len(table.runs)
    return Answer({"file": str(file), "runs": runs}, lambda: print(f"{file}: {runs} runs"))


def _of_wandb(options: argparse.Namespace) -> Answer:
    """Return the table of a project's runs."""
    groups = options.group or [options.table, f"{options.table}-*"]
    import wandb

    try:
        api = wandb.Api()
        entity = options.entity or api.default_entity
        logged = list(api.runs(f"{entity}/{options.wandb}", order="-created_at"))
    except Exception as error:  # some classes of W&B's errors are not public
        raise DataError(f"W&B does not give the runs of {options.wandb}: {error}") from error
    runs = []
    notes: list[str] = []
    for run in logged:
        if any(fnmatchcase(run.group or "", pattern) for pattern in groups):
            with skipping(f"{run.name} ({run.id})", notes):  # perhaps of another program
                runs.append(as_run(run))
    # The newest run comes first, and counts if the same run was done again with force=true.
    runs = without_repeated(runs, notes)
    note(notes)
    if not runs:
        raise ConfigError(f"--group {' or '.join(groups)}: no finished run; * is any group")
    table = table_of(runs)
    paper = Comparison(options.table, table.labels["model"])
    cells = table_cells(table, paper=paper)
    text = markdown(texts(table, cells))
    note(paper.notes)
    return Answer({"rows": records(table, cells)}, lambda: print(text, end=""))


def as_run(logged: Any) -> Run:
    """Convert a run of `wandb.Api`. Its errors are those of `Run`."""
    flat = {}
    for name, value in dict(logged.summary_metrics).items():
        group, _, rest = name.partition("/")
        if group == "perplexity":
            flat[f"perplexity/sparse/{rest}/value"] = value
        elif group == RECORD:
            flat[rest] = value
    metrics = nested({name: _WORDS.get(value, value) for name, value in flat.items()}, "/")
    # W&B does not keep None.
    missing: dict[str, Any] = {"metrics": {}, "stderr": {}, "n": None, "num_fewshot": None}
    for tasks in metrics.get("tasks", {}).values():
        for task, values in tasks.items():
            tasks[task] = missing | values
    settings = {key: value for key, value in logged.config.items() if not key.startswith("_")}
    config = nested({key.removeprefix(f"{RECORD}."): value for key, value in settings.items()})
    directory = Path(config.pop("run_directory"))
    del config["config_hash"]
    metrics["evaluation"] = evaluation_of(config)
    return Run(directory, config, metrics, [metrics])
