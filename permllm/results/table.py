"""What a person sees at the end: one run, or several side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from permllm.record.figures import result_rows
from permllm.results.render import heading, shown
from permllm.results.summary import Summary, row_labels
from permllm.runtime.terminal import terminal


def print_run(metrics: dict[str, Any], directory: Path, console: Console | None = None) -> None:
    """Table of one finished run: dense and sparse, sparsity, time, memory, and where the files are."""
    console = console or terminal()
    table = Table(title=escape(metrics["name"]), title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    for label, dense, sparse in result_rows(metrics):
        table.add_row(escape(label), dense, sparse)
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


def print_comparison(summary: Summary, console: Console | None = None) -> None:
    """Table of several finished runs: a column for each row of the summary, after the dense model's where all share it."""
    console = console or terminal()
    table = Table(title="sparse models", title_justify="left")
    table.add_column("")
    if summary.dense:
        table.add_column("dense", justify="right")
    for row, label in zip(summary.rows, row_labels(summary), strict=True):
        seeds = f"\n{len(row.runs)} seeds" if len(row.runs) > 1 else ""
        table.add_column(escape(label) + seeds, justify="right", overflow="fold")
    for name in summary.measures:
        cells = [shown(row.measures[name]) if name in row.measures else "-" for row in summary.rows]
        dense = [shown(summary.dense[name]) if name in summary.dense else ""] if summary.dense else []
        table.add_row(escape(heading(summary, name)), *dense, *cells)
    console.print(table)


def print_jobs(jobs: Sequence[tuple[str, str, str]], console: Console | None = None) -> None:
    """What became of the jobs of a sweep, `(label, outcome, directory or reason)`, and how many of each."""
    console = console or terminal()
    table = Table(title="jobs", title_justify="left")
    for title in ("job", "outcome", "run, or reason"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        table.add_row(*map(escape, job))
    console.print(table)
    counts = Counter(outcome for _, outcome, _ in jobs)
    console.print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ran", "skipped", "failed") if counts[outcome]))


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
