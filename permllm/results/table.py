"""What a person sees at the end: one run, or several side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def terminal() -> Console:
    """Console for tables: the width of the terminal, or wide enough for any table when the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def print_run(metrics: dict[str, Any], directory: Path, console: Console | None = None) -> None:
    """Table of one finished run: dense and sparse, sparsity, time, memory, and where the files are."""
    console = console or terminal()
    table = Table(title=metrics["name"], title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    for label, dense, sparse in result_rows(metrics):
        table.add_row(label, dense, sparse)
    console.print(table)
    sparsity = metrics["sparsity"]
    console.print(
        f"sparsity  {sparsity['pattern']} ({sparsity['fraction']:.2%} zeros, {sparsity['violations']} violations, "
        f"{_mean(metrics['retained_saliency']):.2%} of the saliency kept)"
    )
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in metrics["seconds"].items())
    console.print(f"time      {_duration(sum(metrics['seconds'].values()))} ({stages})")
    console.print(f"memory    {metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak")
    console.print(f"files     {directory}", soft_wrap=True)


def print_comparison(runs: Sequence[tuple[str, dict[str, Any], Path]], console: Console | None = None) -> None:
    """Table of several finished runs, a column a run: the dense model once, then each `(label, metrics, directory)`."""
    console = console or terminal()
    columns = [{name: (dense, sparse) for name, dense, sparse in result_rows(metrics)} for _, metrics, _ in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    table = Table(title="sparse models (dense in brackets where it differs)", title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    for label, _, _ in runs:
        table.add_column(escape(label), justify="right", overflow="fold")
    for name in names:
        dense = {column[name][0] for column in columns if name in column}
        cells = []
        for column in columns:
            before, after = column.get(name, ("", "-"))
            cells.append(after if len(dense) == 1 or not before else f"{after} ({before})")
        table.add_row(name, dense.pop() if len(dense) == 1 else "", *cells)
    table.add_row("saliency kept", "", *[f"{_mean(metrics['retained_saliency']):.2%}" for _, metrics, _ in runs])
    table.add_row("output error", "", *[f"{_mean(metrics['output_error']):.4f}" for _, metrics, _ in runs])
    table.add_row("time", "", *[_duration(sum(metrics["seconds"].values())) for _, metrics, _ in runs])
    console.print(table)
    for label, _, directory in runs:
        console.print(f"{label}: {directory}", soft_wrap=True)


def print_jobs(jobs: Sequence[tuple[str, str, str]], console: Console | None = None) -> None:
    """What became of the jobs of a sweep: `(label, ran, skipped or failed, reason)`, and how many of each."""
    console = console or terminal()
    table = Table(title="jobs", title_justify="left")
    for heading in ("job", "outcome", "reason"):
        table.add_column(heading, overflow="fold")
    for job in jobs:
        table.add_row(*map(escape, job))
    console.print(table)
    counts = Counter(outcome for _, outcome, _ in jobs)
    console.print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ran", "skipped", "failed") if counts[outcome]))


def result_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Every measure of a finished run: its name, the dense model's value and the sparse one's, as they are shown."""
    rows = []
    dense, sparse = metrics.get("perplexity", {}).get("dense", {}), metrics.get("perplexity", {}).get("sparse", {})
    for name, values in dense.items():
        label = f"{name} perplexity (window {values['window']})"
        rows.append((label, f"{values['value']:.2f}", f"{sparse[name]['value']:.2f}"))
    dense, sparse = metrics.get("zero_shot", {}).get("dense", {}), metrics.get("zero_shot", {}).get("sparse", {})
    for name, values in dense.items():
        items = f", {'limited to ' if values['limited'] else ''}{values['n']} items" if values["n"] else ""
        label = f"{name} acc{items}"
        rows.append((label, _accuracy(values), _accuracy(sparse[name])))
    if len(counted_tasks(dense)) > 1:
        means = [mean_accuracy(part) for part in (dense, sparse)]
        rows.append(("average acc", f"{means[0]:.1%}", f"{means[1]:.1%}"))
    return rows


def counted_tasks(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """The tasks of a zero-shot result that a mean is taken over.

    An lm-eval group counts its subtasks itself and has no items of its own; some tasks have no accuracy.
    """
    return [name for name, values in tasks.items() if values["n"] and values["acc"] is not None]


def mean_accuracy(tasks: dict[str, dict[str, Any]]) -> float:
    """Over the counted tasks of a zero-shot result; not a number where there is none."""
    counted = counted_tasks(tasks)
    return sum(float(tasks[name]["acc"]) for name in counted) / len(counted) if counted else math.nan


def _accuracy(values: dict[str, Any]) -> str:
    if values["acc"] is None:
        return "-"
    error = "" if values["stderr"] is None else f" ± {values['stderr']:.1%}"
    return f"{values['acc']:.1%}{error}"


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
