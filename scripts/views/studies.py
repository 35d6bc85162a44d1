"""Views of what the measure.py of a folder finds, its picture, and what it was measured with."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.measuring import kept_records
from permllm.runs.names import RECORDS
from permllm.runs.published import published
from scripts.views.tables import Entry, machine, published_table


def study(folder: Path, claim: str = "", command: str = "", table: str = "") -> list[str]:
    """The tables of a measurement.

    Args:
        folder: of the document, with a measure.py and its records.
        claim: what the paper shows with it, for the index, and the picture's text.
        command: what was run.
        table: of the paper, whose numbers stand below.
    """
    lines = ["", f"    {command}", ""] if command else [""]
    for record in kept_records(folder / RECORDS):
        lines += [*_lines(folder, record), ""]
        picture = folder / f"{record['run']}.png"
        if picture.is_file():
            lines += [f"![{claim}]({picture.name})", ""]
        lines += [machine([record["environment"]]), ""]
    if table:
        lines += [f"The paper's {table.replace('table', 'table ')}:", "", *published_table(published(table)), ""]
    return lines[:-1]


def entry(folder: Path, claim: str, command: str, table: str = "") -> Entry:
    """Its row in the index; arguments as `study`."""
    (record,) = kept_records(folder / RECORDS)
    lines = _lines(folder, record)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    ours = "; ".join(f"{row[0]}: {', '.join(cell for cell in row[1:] if cell)}" for row in rows)
    theirs = "a picture, no numbers"
    if table:
        ours += f" (ms, {'on a GPU' if record['metrics']['study']['sparse_tensor_cores'] else 'on a CPU'})"
        theirs = _runtimes(table)
    return Entry(claim, command, ours, theirs, sum(record["metrics"]["seconds"].values()))


def _runtimes(table: str) -> str:
    values = {(row.method, row.setting, row.metric): row.value for row in published(table)}
    parts = [
        f"{setting} {values['dense', setting, metric]:g}, 2:4 {values['2:4+cp', setting, metric]:g}"
        for (method, setting, metric) in values
        if method == "dense"
    ]
    parts += [f"{setting} {value:g}" for (_, setting, metric), value in values.items() if setting.startswith("channel")]
    return "; ".join(parts) + " (ms, on a GPU)"


def _lines(folder: Path, record: dict[str, Any]) -> list[str]:
    measure = import_module(f"experiments.{folder.resolve().name}.measure")
    return list(measure.lines(record["metrics"]["study"]))
