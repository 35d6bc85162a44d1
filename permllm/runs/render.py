"""Tables of runs as text, with changes from a baseline and the paper's numbers beside, and on the terminal."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table as Printed

from permllm.config import finite
from permllm.runs.compare import change, paired
from permllm.runs.measures import number, patterns_text, result_rows
from permllm.runs.published import Comparison, published
from permllm.runs.read import Run
from permllm.runs.table import Table
from permllm.runtime.terminal import terminal

FORMATS = ("md", "csv", "latex", "json")


def as_text(frame: pd.DataFrame, format: str, words: int = 0) -> str:
    """Return a frame of texts as Markdown, CSV or LaTeX.

    Args:
        frame: cells as they are shown.
        format: `md`, `csv` or `latex`.
        words: number of first columns that LaTeX aligns to the left.
    """
    if format == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    if format == "latex":
        columns = "l" * words + "r" * (len(frame.columns) - words)
        return str(frame.to_latex(index=False, escape=True, column_format=columns)).replace(
            "±", r"$\pm$"
        )
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def render(table: Table, format: str, paper: Comparison | None = None) -> str:
    """Return a table in one of `FORMATS`; `paper` as in `cells`."""
    if format == "json":
        return as_json(records(table, paper))
    return as_text(cells(table, paper), format, len(table.settings))


def as_json(value: Any) -> str:
    """Return plain values as JSON; None stands for infinity and for what is not a number."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def cells(table: Table, paper: Comparison | None = None) -> pd.DataFrame:
    """Return the cells of a table as they are shown, the dense model's row first, where all rows share it.

    Args:
        table: of the runs; with a baseline the others' changes in the main measure and the average
            accuracy are shown.
        paper: puts the published numbers beside ours.
    """
    found: dict[str, list[str]] = {name: ["", *table.labels[name]] for name in table.settings}
    if any(len(members) > 1 for members in table.rows):
        found["seeds"] = ["", *(str(len(members)) for members in table.rows)]
    main, changes = table.main(), changes_of(table, paper)
    for name in table.measures:
        kind, prefix = table.kinds[name], "" if name == main else f"{name}, "
        found[table.heading(name)] = [
            table.shown_dense(name),
            *(table.shown(row, name) for row in range(len(table.rows))),
        ]
        titles = {"ours": "against the baseline"}
        values = _published(table, paper, name)
        if paper and any(value is not None for value in values):
            every = [paper.dense(name), *values]
            found[prefix + paper.heading] = [
                "" if value is None else number(value, kind) for value in every
            ]
            if paper.same_model:
                differences = (table.means[name] - pd.Series(values, dtype=float)) * (
                    100 if kind == "accuracy" else 1
                )
                found[f"{prefix}difference"] = [
                    "",
                    *differences.map("{:+.2f}".format, na_action="ignore").fillna(""),
                ]
            else:
                titles |= {
                    "paper": "paper, against its baseline",
                    "difference": "difference of the changes",
                }
        for key, title in titles.items() if name in changes else ():
            each = [
                _change_text(one[key], one["interval"] if key == "ours" else None, kind)
                for one in changes[name]
            ]
            found[f"{prefix}{title}"] = ["", *each]
    frame = pd.DataFrame(found)
    if not table.dense:
        return frame.iloc[1:].reset_index(drop=True)
    frame.iloc[0, 0] = "dense"
    return frame


def changes_of(table: Table, paper: Comparison | None) -> dict[str, list[dict[str, Any]]]:
    """Return each row's changes from the baseline in the main measure and the average accuracy, as shares.

    Returns:
        By measure, for each row: `ours` and its `interval`; `paper` and the `difference` of the
        two, where the paper's numbers are of another model, so that only changes can be compared.
        None where there is none.
    """
    baseline, found = table.baseline, dict[str, list[dict[str, Any]]]()
    if baseline is None:
        return found
    for name in [name for name in table.measures if name in (table.main(), "average acc")]:
        values, found[name] = (
            _published(table, None if paper and paper.same_model else paper, name),
            [],
        )
        for row, value in enumerate(values):
            one = dict.fromkeys(("ours", "interval", "paper", "difference"))
            if row != baseline and (ours := change(table, row, baseline, name)) is not None:
                one |= {"ours": ours, "interval": paired(table, row, baseline, name).interval}
                if value is not None and (start := values[baseline]) is not None:
                    theirs = (
                        value / start - 1 if table.kinds[name] == "perplexity" else value - start
                    )
                    one |= {"paper": theirs, "difference": ours - theirs}
            found[name].append(one)
    return found


def records(table: Table, paper: Comparison | None = None) -> list[dict[str, Any]]:
    """Return the rows as plain values; `paper` as in `cells`."""
    changes, found = changes_of(table, paper), []
    published = {name: _published(table, paper, name) for name in table.measures}
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
            "dense": {
                name: {"mean": mean, "stderr": stderr}
                for name, (mean, stderr) in table.dense.items()
            },
        }
        if paper:
            values = {name: published[name][row] for name in names}
            record["paper"] = {"from": paper.heading} | {
                name: value for name, value in values.items() if value is not None
            }
        if table.baseline is not None:
            record["against_baseline"] = {
                name: each[row] for name, each in changes.items() if name in names
            }
        found.append(record | {"runs": [str(table.runs[run].directory) for run in members]})
    return found


def beside(name: str | None, table: Table) -> Comparison | None:
    """Return the paper's table of this name for some runs; None where no table is asked for."""
    return (
        Comparison(published(name), *sorted({run.config["model"]["name"] for run in table.runs}))
        if name
        else None
    )


def compared(found: list[dict[str, Any]], names: list[str], format: str) -> str:
    """Return `permllm.runs.compare.comparison` of two rows of these names in one of `FORMATS`."""
    if format == "json":
        return as_json(found)
    lines = []
    for line in found:
        kind, ends = line["kind"], [f"{end * 100:+.1f}" for end in line["interval"] or ()]
        between, difference = (
            " to ".join(ends) + (_unit(kind) if ends else ""),
            _change_text(line["difference"], None, kind),
        )
        lines.append(
            [line["measure"], line["first"], line["second"], difference, between, line["over"]]
        )
    header = ["measure", *names, "difference", "95 % interval", "over"]
    return as_text(pd.DataFrame(lines, columns=header), format, 1)


def machine(runs: Iterable[Run]) -> str:
    """Return what runs were computed with, in a line."""
    runs, found = list(runs), [run.environment for run in runs]
    names = {"python": "Python", "torch": "torch", "transformers": "transformers"}
    versions = sorted(
        {
            ", ".join(f"{shown} {one['versions'][name]}" for name, shown in names.items())
            for one in found
        }
    )
    commits = sorted(
        {
            one["git"]["commit"][:10] + " with changes" * one["git"]["dirty"]
            for one in found
            if one.get("git")
        }
    )
    started = sorted(one["started"][:10] for one in found)
    days = " to ".join(dict.fromkeys((started[0], started[-1])))
    of_code = [f"commit {', '.join(commits)}"] if commits else []
    machines = set()
    for run, hardware in ((run, run.environment["hardware"]) for run in runs):
        instructions = (
            f" ({hardware['instructions']})"
            if "instructions" in hardware and "gpu" not in hardware
            else ""
        )
        several = f", {hardware['processes']} processes" if "processes" in hardware else ""
        machines.add(f"{processor(run)}{instructions}, {hardware['threads']} threads{several}")
    return "; ".join([*sorted(machines), *versions, *of_code, days]) + "."


def processor(run: Run) -> str:
    """Return the GPU that a run was computed on, or else the processor."""
    hardware = run.environment["hardware"]
    return str(hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"])


def _published(table: Table, paper: Comparison | None, name: str) -> list[float | None]:
    """Return the paper's number for each row, None where it has none."""
    firsts = [
        (table.first(row).config, table.value(members[0], name))
        for row, members in enumerate(table.rows)
    ]
    return [paper.value(config, name, ours) if paper else None for config, ours in firsts]


def _change_text(change: float | None, interval: list[float] | None, kind: str) -> str:
    between = "" if interval is None else f" [{interval[0] * 100:+.1f}, {interval[1] * 100:+.1f}]"
    return "" if change is None else f"{change * 100:+.1f}{_unit(kind)}{between}"


def _unit(kind: str) -> str:
    return " points" if kind in ("accuracy", "share") else "%"


def print_run(metrics: dict[str, Any], directory: Path) -> None:
    """Print one finished run: dense and sparse, sparsity, time, memory, and where the files are."""
    console, table = terminal(), Printed("", title=escape(metrics["name"]), title_justify="left")
    for which in ("dense", "sparse"):
        table.add_column(which, justify="right")
    for row in result_rows(metrics):
        table.add_row(*map(escape, row))
    console.print(table if table.row_count else "nothing was measured")
    sparsity, seconds, placement = (
        metrics["sparsity"],
        metrics["seconds"],
        metrics.get("placement", "device"),
    )
    retained = (
        f"{statistics.fmean(metrics['retained_saliency'].values()):.2%} of the saliency retained"
    )
    counts = f"{sparsity['fraction']:.2%} zeros, {sparsity['violations']} violations"
    console.print(f"sparsity  {patterns_text(sparsity)} ({counts}, {retained})")
    stages = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    console.print(f"time      {_duration(sum(seconds.values()))} ({stages})")
    planned = (
        f" ({metrics['planned_memory_bytes'] / 1e9:.2f} GB were planned)"
        if "planned_memory_bytes" in metrics
        else ""
    )
    where = f", model.placement={placement}" if placement != "device" else ""
    console.print(
        f"memory    {metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak{planned}{where}"
    )
    console.print(f"files     {directory}", soft_wrap=True)


def print_comparison(table: Table) -> None:
    """Print several finished runs: a column for each row of their table, after the dense model's where all share it."""
    printed = Printed("", title="sparse models", title_justify="left")
    if table.dense:
        printed.add_column("dense", justify="right")
    for label, members in zip(table.names(), table.rows, strict=True):
        seeds = f"\n{len(members)} seeds" if len(members) > 1 else ""
        printed.add_column(escape(label) + seeds, justify="right", overflow="fold")
    for name in table.measures:
        dense = [table.shown_dense(name)] * bool(table.dense)
        printed.add_row(
            escape(table.heading(name)),
            *dense,
            *(table.shown(row, name) or "-" for row in table.labels.index),
        )
    terminal().print(printed)


def print_jobs(jobs: Sequence[tuple[str, str, str]]) -> None:
    """Print what became of the jobs of a sweep, `(label, outcome, directory or reason)`, and how many of each."""
    console, table = terminal(), Printed(title="jobs", title_justify="left")
    for title in ("job", "outcome", "run, or reason"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        table.add_row(*map(escape, job))
    console.print(table)
    counts = Counter(outcome for _, outcome, _ in jobs)
    console.print(
        ", ".join(
            f"{counts[outcome]} {outcome}"
            for outcome in ("ran", "skipped", "failed")
            if counts[outcome]
        )
    )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 60
        else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    )
