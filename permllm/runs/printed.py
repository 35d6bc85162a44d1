"""Tables on the terminal: one finished run, several side by side, and the jobs of a sweep."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from permllm.runs.figures import patterns_text, result_rows
from permllm.runs.table import Table
from permllm.runtime.terminal import terminal


def print_run(metrics: dict[str, Any], directory: Path, console: Console | None = None) -> None:
    """Print one finished run: dense and sparse, sparsity, time, memory, and where the files are."""
    console = console or terminal()
    table = Printed(title=escape(metrics["name"]), title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    for label, dense, sparse in result_rows(metrics):
        table.add_row(escape(label), dense, sparse)
    console.print(table if table.row_count else "nothing was measured")
    sparsity, seconds = metrics["sparsity"], metrics["seconds"]
    retained = statistics.fmean(metrics["retained_saliency"].values())
    console.print(
        f"sparsity  {patterns_text(sparsity)} ({sparsity['fraction']:.2%} zeros, {sparsity['violations']} violations, "
        f"{retained:.2%} of the saliency retained)"
    )
    stages = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    console.print(f"time      {_duration(sum(seconds.values()))} ({stages})")
    planned = metrics.get("planned_memory_bytes")
    plan = "" if planned is None else f" ({planned / 1e9:.2f} GB were planned)"
    placed = f", model.placement={where}" if (where := metrics.get("placement", "device")) != "device" else ""
    console.print(f"memory    {metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak{plan}{placed}")
    console.print(f"files     {directory}", soft_wrap=True)


def print_comparison(table: Table, console: Console | None = None) -> None:
    """Print several finished runs: a column for each row of their table, after the dense model's where all share it."""
    printed = Printed("", title="sparse models", title_justify="left")
    if table.dense:
        printed.add_column("dense", justify="right")
    for row, label in enumerate(table.names()):
        seeds = f"\n{len(table.rows[row])} seeds" if len(table.rows[row]) > 1 else ""
        printed.add_column(escape(label) + seeds, justify="right", overflow="fold")
    for name in table.measures:
        dense = [table.shown_dense(name)] * bool(table.dense)
        cells = [table.shown(row, name) or "-" for row in range(len(table.rows))]
        printed.add_row(escape(table.heading(name)), *dense, *cells)
    (console or terminal()).print(printed)


def print_jobs(jobs: Sequence[tuple[str, str, str]], console: Console | None = None) -> None:
    """Print what became of the jobs of a sweep, `(label, outcome, directory or reason)`, and how many of each."""
    console = console or terminal()
    table = Printed(title="jobs", title_justify="left")
    for title in ("job", "outcome", "run, or reason"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        table.add_row(*map(escape, job))
    console.print(table)
    counts = Counter(outcome for _, outcome, _ in jobs)
    console.print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ran", "skipped", "failed") if counts[outcome]))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
