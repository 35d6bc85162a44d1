"""What a person sees at the end: one run, or several side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from permllm.runs.render import heading, shown
from permllm.runs.table import Summary, row_labels
from permllm.runtime.terminal import terminal


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
