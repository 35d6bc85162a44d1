"""Draw the gap that methods close over the speed limit and over bytes.

python scripts/gap_figure.py RECORDS.jsonl CURVE.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.report.gaps import GAP
from permllm.report.measures import DENSE_WEIGHTS, SPEED_LIMIT
from permllm.report.plots import picture
from permllm.report.read import Run, collect
from permllm.report.table import table_of
from permllm.settings.config import NMPattern
from permllm.sparsity.two_of_four import stored_share

# Settings of the row at which the gap is 0 %.
_WANDA = "method=wanda,allocation=uniform,sparsity=2:4,keep_dense="


def draw(runs: list[Run], file: Path) -> None:
    """Draw the gap over the speed limit, and over the bytes of the linears in FP8."""
    table = table_of(runs, _WANDA)
    rows = table.labels[["method", "sparsity", "keep_dense"]].assign(
        speed=table.means[SPEED_LIMIT], gap=table.means[GAP], error=table.errors[GAP].fillna(0.0)
    )
    dense = table.means[DENSE_WEIGHTS].reindex(rows.index)
    rows["bytes"] = dense + (1 - dense) * rows["sparsity"].map(
        lambda sparsity: stored_share(NMPattern.parse(sparsity), 8)
    )
    rows["line"] = rows["method"]
    other = rows["sparsity"] != "2:4"
    rows.loc[other, "line"] += ", " + rows["sparsity"][other] + " everywhere"
    rows.loc[rows["keep_dense"] != "", "line"] += ", first and last layers dense"
    with picture(file) as pyplot:
        _, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
        _lines(left, rows, "speed")
        _lines(right, rows, "bytes")
        left.set(xlabel="speed limit: weights / nonzero weights", ylabel=GAP)
        left.invert_xaxis()
        right.set(xlabel="bytes of the linears in FP8, of the dense ones' in FP8")
        right.xaxis.set_major_formatter("{x:.0%}")
        left.legend(fontsize="small")


def _lines(axis: Any, rows: pd.DataFrame, over: str) -> None:
    """Draw each `line` of the rows."""
    for label, points in rows.groupby("line"):
        ordered = points.sort_values(over)
        axis.errorbar(ordered[over], ordered["gap"], ordered["error"], fmt="o-", label=label)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(collect([options.records]).runs, options.picture)
