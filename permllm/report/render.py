"""Tables of runs as text: with changes from a baseline and the paper's numbers, or printed."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table as Printed

from permllm.command import terminal
from permllm.report.compare import Comparison, paired, published
from permllm.report.measures import number, patterns_text, result_rows
from permllm.report.read import Run
from permllm.report.table import Table
from permllm.store.files import EXPORT

FORMATS = ("md", "csv", "latex")
INTERVAL = "95 % interval"
# Patterns of marks in the cells of a table, and the source of the uncertainty behind each.
_SOURCES = {
    "±": "± is the standard deviation over the seeds of a row, or in a row of one seed the "
    "standard error over the items",
    rf"\[[+-]|{INTERVAL}": f"a {INTERVAL} is that of a paired bootstrap over windows or items, of "
    "scores averaged over the seeds",
}


def as_text(frame: pd.DataFrame, format: str, words: int = 0) -> str:
    """Return a frame of texts as Markdown, CSV or LaTeX.

    Args:
        frame: texts of the cells.
        format: one of `FORMATS`.
        words: number of columns, from the first on, that LaTeX aligns to the left.
    """
    if format == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    if format == "latex":
        columns = "l" * words + "r" * (len(frame.columns) - words)
        text = str(frame.to_latex(index=False, escape=True, column_format=columns))
        return text.replace("±", r"$\pm$")
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    cells = (" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


def sources(frame: pd.DataFrame) -> list[str]:
    """Return the sources of the uncertainties in a frame of texts, a line for each kind."""
    text = frame.to_csv(index=False)
    return [line for mark, line in _SOURCES.items() if re.search(mark, text)]


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame of texts as Markdown, with the lines of `sources` below it."""
    below = "; ".join(sources(frame))
    return as_text(frame, "md") + (f"\n{below[0].upper()}{below[1:]}.\n" if below else "")


def cells(table: Table, paper: Comparison | None = None) -> pd.DataFrame:
    """Return the texts of a table's cells. The first row is the dense model if all rows share it.

    Args:
        table: table of the runs. With a baseline there are columns for the changes in the main
            measure and the average accuracy.
        paper: finder of the paper's numbers, which get columns beside ours; None: no such columns.
    """
    columns: dict[str, list[str]] = {name: ["", *table.labels[name]] for name in table.settings}
    if any(len(members) > 1 for members in table.rows):
        columns["seeds"] = ["", *(str(len(members)) for members in table.rows)]
    main = table.main()
    changes = changes_of(table, paper)
    for name in table.measures:
        kind = table.kinds[name]
        prefix = "" if name == main else f"{name}, "
        ours = [table.shown(row, name) for row in table.labels.index]
        columns[table.heading(name)] = [table.shown_dense(name), *ours]
        titles = {"ours": "against the baseline"}
        values = _published(table, paper, name)
        if paper and any(value is not None for value in values):
            columns[prefix + paper.heading] = [
                "" if value is None else number(value, kind)
                for value in (paper.dense(name), *values)
            ]
            if paper.same_model:
                scale = 100 if kind == "accuracy" else 1
                differences = (table.means[name] - pd.Series(values, dtype=float)) * scale
                texts = differences.map("{:+.2f}".format, na_action="ignore").fillna("")
                columns[f"{prefix}difference"] = ["", *texts]
            else:
                titles["paper"] = "paper, against its baseline"
                titles["difference"] = "difference of the changes"
        if name not in changes:
            continue
        for key, title in titles.items():
            texts = []
            for change in changes[name]:
                interval = change["interval"] if key == "ours" else None
                texts.append(_change_text(change[key], interval, kind))
            columns[f"{prefix}{title}"] = ["", *texts]
    frame = pd.DataFrame(columns)
    if not table.dense:
        return frame.iloc[1:].reset_index(drop=True)
    frame.iloc[0, 0] = "dense"
    return frame


def changes_of(table: Table, paper: Comparison | None) -> dict[str, list[dict[str, Any]]]:
    """Return changes from the baseline in the main measure and the average accuracy, as shares.

    Returns:
        By measure, for each row: the change `ours` and its `interval`. If the paper's numbers
        belong to another model, so that only changes can be compared, also the change `paper` and
        the `difference` of the two. None: there is no such number.
    """
    if table.baseline is None:
        return {}
    paper = None if paper and paper.same_model else paper
    names = [name for name in table.measures if name in (table.main(), "average acc")]
    return {name: _changes(table, table.baseline, paper, name) for name in names}


def _changes(
    table: Table, baseline: int, paper: Comparison | None, name: str
) -> list[dict[str, Any]]:
    """Return the changes of one measure."""
    values = _published(table, paper, name)
    changes = []
    for row, value in enumerate(values):
        change: dict[str, Any] = dict.fromkeys(("ours", "interval", "paper", "difference"))
        if row != baseline and table.has(row, name) and table.has(baseline, name):
            pair = paired(table, row, baseline, name)
            change |= {"ours": pair["difference"], "interval": pair["interval"]}
        start = values[baseline]
        if change["ours"] is not None and value is not None and start is not None:
            of_perplexity = table.kinds[name] == "perplexity"
            change["paper"] = value / start - 1 if of_perplexity else value - start
            change["difference"] = change["ours"] - change["paper"]
        changes.append(change)
    return changes


def records(table: Table, paper: Comparison | None = None) -> list[dict[str, Any]]:
    """Return the rows of a table as plain values; `paper` as in `cells`."""
    changes = changes_of(table, paper)
    rows = []
    published = {name: _published(table, paper, name) for name in table.measures}
    dense = {name: {"mean": mean, "stderr": stderr} for name, (mean, stderr) in table.dense.items()}
    for row, members in enumerate(table.rows):
        names = [name for name in table.measures if table.has(row, name)]
        error = "deviation" if len(members) > 1 else "stderr"
        record: dict[str, Any] = {
            "settings": table.labels.loc[row, table.settings].to_dict(),
            "seeds": [table.runs[run].config["seed"] for run in members],
            "measures": {
                name: {"mean": float(table.means.at[row, name]), "deviation": None, "stderr": None}
                | {error: table.error(row, name), "limited": table.limited(name)}
                for name in names
            },
            "dense": dense,
        }
        if paper:
            record["paper"] = {"from": paper.heading} | {
                name: published[name][row] for name in names if published[name][row] is not None
            }
        if table.baseline is not None:
            record["against_baseline"] = {
                name: row_changes[row] for name, row_changes in changes.items() if name in names
            }
        record["runs"] = [str(table.runs[run].directory) for run in members]
        rows.append(record)
    return rows


def beside(name: str | None, table: Table) -> Comparison | None:
    """Return the finder of the numbers of the paper's table `name` for a table of runs, or None."""
    models = sorted({run.config["model"]["name"] for run in table.runs})
    return Comparison(published(name), *models) if name else None


def compared(measures: list[dict[str, Any]], names: list[str]) -> pd.DataFrame:
    """Return the texts of the result of `permllm.report.compare.differences` for two rows."""
    header = ["measure", *names, "difference", INTERVAL, "over"]
    lines = []
    for measure in measures:
        interval = ""
        if measure["interval"]:
            interval = " to ".join(f"{end * 100:+.1f}" for end in measure["interval"])
            interval += _unit(measure["kind"])
        lines.append(
            [
                measure["measure"],
                measure["first"],
                measure["second"],
                _change_text(measure["difference"], None, measure["kind"]),
                interval,
                measure["over"],
            ]
        )
    return pd.DataFrame(lines, columns=header)


def machine(runs: Iterable[Run]) -> str:
    """Return processors, threads, versions, commits and days of runs, in one line."""
    machines = set()
    versions = set()
    commits = set()
    days = set()
    names = {"python": "Python", "torch": "torch", "transformers": "transformers"}
    for run in runs:
        environment = run.environment
        hardware = environment["hardware"]
        of_cpu = "instructions" in hardware and "gpu" not in hardware
        instructions = f" ({hardware['instructions']})" if of_cpu else ""
        processes = f", {hardware['processes']} processes" if "processes" in hardware else ""
        machines.add(f"{processor(run)}{instructions}, {hardware['threads']} threads{processes}")
        versions.add(", ".join(f"{names[name]} {environment['versions'][name]}" for name in names))
        days.add(environment["started"][:10])
        if git := environment.get("git"):
            commits.add(git["commit"][:10] + (" with changes" if git["dirty"] else ""))
    parts = [*sorted(machines), *sorted(versions)]
    if commits:
        parts.append(f"commit {', '.join(sorted(commits))}")
    first = min(days)
    last = max(days)
    parts.append(first if first == last else f"{first} to {last}")
    return "; ".join(parts) + "."


def processor(run: Run) -> str:
    """Return the name of a run's GPU, or else of its processor."""
    hardware = run.environment["hardware"]
    return str(hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"])


def _published(table: Table, paper: Comparison | None, name: str) -> list[float | None]:
    """Return the paper's number for each row; None: it has none."""
    if paper is None:
        return [None] * len(table.rows)
    firsts = [members[0] for members in table.rows]
    return [
        paper.value(table.runs[run].config, name, table.values[run].get(name)) for run in firsts
    ]


def _change_text(change: float | None, interval: list[float] | None, kind: str) -> str:
    if change is None:
        return ""
    text = f"{change * 100:+.1f}{_unit(kind)}"
    if interval is not None:
        text += f" [{interval[0] * 100:+.1f}, {interval[1] * 100:+.1f}]"
    return text


def _unit(kind: str) -> str:
    return " points" if kind in ("accuracy", "share") else "%"


def print_run(metrics: dict[str, Any], directory: Path) -> None:
    """Print one finished run: its measures, sparsity, time, memory, files and export."""
    _print_table(metrics["name"], ["", "dense", "sparse"], result_rows(metrics), "right")
    sparsity = metrics["sparsity"]
    seconds = metrics["seconds"]
    retained = statistics.fmean(metrics["retained_saliency"].values())
    shares = (
        f"{sparsity['fraction']:.2%} zeros, {sparsity['violations']} violations, "
        f"{retained:.2%} of the saliency retained"
    )
    stages = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    memory = f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak"
    if "planned_memory_bytes" in metrics:
        memory += f" ({metrics['planned_memory_bytes'] / 1e9:.2f} GB were planned)"
    if metrics.get("placement", "device") != "device":
        memory += f", model.placement={metrics['placement']}"
    console = terminal()
    console.print(f"sparsity  {patterns_text(sparsity)} ({shares})")
    console.print(f"time      {_duration(sum(seconds.values()))} ({stages})")
    console.print(f"memory    {memory}")
    console.print(f"files     {directory}", soft_wrap=True)
    export = metrics.get("export")
    if export and (directory / EXPORT).is_dir():
        console.print(
            f"export    {directory / EXPORT}: {export['bytes'] / 1e6:.1f} MB, {export['form']}, "
            f"{export['dtype']}",
            soft_wrap=True,
        )


def print_comparison(table: Table) -> None:
    """Print several finished runs, with a column for each row of their table."""
    frame = cells(table).drop(columns=table.settings)
    names = ["dense", *table.names()] if table.dense else table.names()
    rows = ([name, *(value or "-" for value in values)] for name, values in frame.items())
    _print_table("sparse models", ["", *names], rows, "right")
    for line in sources(frame):
        terminal().print(line, markup=False, highlight=False)


def print_jobs(jobs: Sequence[tuple[str, str, str]]) -> None:
    """Print the jobs of a sweep, `(label, outcome, directory or reason)`, and their counts."""
    _print_table("jobs", ["job", "outcome", "run, or reason"], jobs, "left")
    counts = Counter(outcome for _, outcome, _ in jobs)
    texts = [f"{counts[name]} {name}" for name in ("ran", "skipped", "failed") if counts[name]]
    terminal().print(", ".join(texts))


def _print_table(title: str, header: list[str], rows: Iterable[Sequence[str]], side: Any) -> None:
    """Print a table of texts; all columns but the first are aligned to one side."""
    printed = Printed(title=escape(title), title_justify="left")
    for place, name in enumerate(header):
        printed.add_column(escape(name), justify=side if place else "left", overflow="fold")
    for row in rows:
        printed.add_row(*map(escape, row))
    terminal().print(printed if printed.row_count else "nothing was measured")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
