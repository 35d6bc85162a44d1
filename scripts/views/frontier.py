"""The view of what closes how much of the gap in how many minutes: the most first, with its memory."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from permllm.errors import DataError
from permllm.runs.cost import memory, minutes, spent_elsewhere
from permllm.runs.names import RECORDS
from permllm.runs.render import as_text, cells
from permllm.runs.table import GAP
from scripts.views.tables import machine, narrowed, runs_of


def frontier(folder: Path, columns: str, baseline: str, records: str = RECORDS) -> list[str]:
    """Rows by their mean gap closed; minutes are those of calibration, permutation, mask and pruning of the fastest seed.

    Rows whose permutation is another run's are left out, as in the picture.

    Args:
        folder: of the document.
        columns: settings, with commas; whatever else varies follows from them.
        baseline: the row that the gap is measured from.
        records: the file of the runs.
    """
    runs = runs_of(folder / records)
    summary, _ = narrowed(runs, columns, "gap closed, perplexity", baseline)
    if lacking := [row for row in summary.rows if GAP not in row.measures]:
        raise DataError(f"{folder / records}: {lacking[0].runs[0].directory.name} has no text that all have: no gap is closed")
    rows = [row for row in summary.rows if not spent_elsewhere(row)]
    summary.rows = sorted(rows, key=lambda row: -row.measures[GAP].mean)
    summary.measures = [GAP, *(name for name in summary.measures if "perplexity (" in name)]
    header, body = cells(summary)
    table = pd.DataFrame(body, columns=header)
    costs = [[f"{minutes(row):.1f}", f"{memory(row) / 1e9:.2f} GB"] for row in summary.rows]
    costs = [["", ""]] * (len(body) - len(costs)) + costs  # the dense model's row has none
    place = header.index(GAP)
    table.insert(place, "minutes", [cost[0] for cost in costs])
    table.insert(place + 1, "peak memory", [cost[1] for cost in costs])
    return [*as_text(table, "md").splitlines(), "", machine(run.environment for run in runs)]
