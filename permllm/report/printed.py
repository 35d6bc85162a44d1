"""Lines and tables of a terminal: what a finished run prints."""

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from permllm.command import terminal
from permllm.report.metrics import result_rows, sparsity_text
from permllm.store.files import EXPORT


def print_run(metrics: dict[str, Any], directory: Path) -> None:
    """Print one finished run: its metrics, sparsity, time, memory, files and export."""
    print_table(metrics["name"], ["", "dense", "sparse"], result_rows(metrics))
    sparsity = metrics["sparsity"]
    seconds = metrics["seconds"]
    retained = statistics.fmean(metrics["retained_saliency"].values())
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    memory = f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak"
    if "planned_memory_bytes" in metrics:
        memory += f" ({metrics['planned_memory_bytes'] / 1e9:.2f} GB were planned)"
    lines = {
        "sparsity": f"{sparsity_text(sparsity)} ({sparsity['fraction']:.2%} zeros, "
        f"{sparsity['violations']} violations, {retained:.2%} of the saliency retained)",
        "time": f"{_duration(sum(seconds.values()))} ({phases})",
        "memory": memory,
        "files": directory,
    }
    if (directory / EXPORT).is_dir():
        lines["export"] = directory / EXPORT
    lines["compare"] = commands_for(directory.parent)
    for name, text in lines.items():
        terminal().print(f"{name:9} {text}", markup=False, soft_wrap=True)


def commands_for(folder: Path) -> str:
    """Return the commands that show the runs below a folder as a table and as a page."""
    place = os.path.relpath(folder)
    return f"permllm results {place}; permllm report {place} --to report.html"


def print_job(name: str, metrics: dict[str, Any], directory: Path) -> None:
    """Print a line for a finished job of a sweep: its name, metrics, time and files."""
    results = [f"{metric} {sparse}" for metric, _, sparse in result_rows(metrics)]
    parts = [*results, _duration(sum(metrics["seconds"].values())), str(directory)]
    line = f"{name}: {', '.join(parts)}"
    terminal().print(line, markup=False, highlight=False, soft_wrap=True)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of texts; all columns but the first are aligned to the right."""
    table = Table(title=escape(title), title_justify="left")
    for place, name in enumerate(header):
        table.add_column(escape(name), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    terminal().print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
