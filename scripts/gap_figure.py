"""Draw the gap that methods close over speed, or over the size of models.

python scripts/gap_figure.py allocation RECORDS.jsonl CURVE.png
python scripts/gap_figure.py sizes RECORDS.jsonl SIZES.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.report.gaps import GAP
from permllm.report.metrics import DENSE_WEIGHTS, SPEED_LIMIT
from permllm.report.plots import picture
from permllm.report.read import Run, collect
from permllm.report.table import table_of
from permllm.settings.config import NMPattern
from scripts.readme_tables import tables_by_model
from scripts.two_of_four import stored_share

# Settings of the row at which the gap is 0 %.
_WANDA_AT_2_4 = "method=wanda,allocation=uniform,sparsity=2:4,keep_dense=none"


def allocation(runs: list[Run], file: Path) -> None:
    """Draw the gap over the speed limit, and over the bytes of the linears in FP8."""
    table = table_of(runs, _WANDA_AT_2_4)
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
    rows.loc[rows["keep_dense"] != "none", "line"] += ", first and last layers dense"
    with picture(file) as pyplot:
        _, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
        _lines(left, rows, "speed")
        _lines(right, rows, "bytes")
        left.set(xlabel="speed limit: weights / nonzero weights", ylabel=GAP)
        left.invert_xaxis()
        right.set(xlabel="bytes of the linears in FP8, of the dense ones' in FP8")
        right.xaxis.set_major_formatter("{x:.0%}")
        left.legend(fontsize="small")


def sizes(runs: list[Run], file: Path) -> None:
    """Draw the gap over the size of the model, of methods that several models have."""
    tables = tables_by_model(runs, "wanda")
    rows = pd.concat(
        table.labels[["method"]].assign(
            size=_size(model), gap=table.means[GAP], error=table.errors[GAP].fillna(0.0)
        )
        for model, table in tables.items()
    )
    rows = rows.rename(columns={"method": "line"}).dropna(subset="gap")
    rows = rows[rows.duplicated("line", keep=False)]
    with picture(file) as pyplot:
        _, axis = pyplot.subplots(figsize=(8, 5))
        _lines(axis, rows, "size")
        axis.set(ylabel=GAP, xscale="log")
        axis.set_xticks([_size(model) for model in tables], [*tables], minor=False)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _size(model: str) -> float:
    """Return the number of parameters that a model's name ends with, such as 135m or 0.5b."""
    *_, ending = model.split("-")
    return float(ending[:-1]) * {"m": 1e6, "b": 1e9}[ending[-1]]


def _lines(axis: Any, rows: pd.DataFrame, over: str) -> None:
    """Draw each `line` of the rows."""
    for label, points in rows.groupby("line"):
        ordered = points.sort_values(over)
        axis.errorbar(ordered[over], ordered["gap"], ordered["error"], fmt="o-", label=label)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    figures = {"allocation": allocation, "sizes": sizes}
    parser.add_argument("figure", choices=figures)
    parser.add_argument("records", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    figures[options.figure](collect([options.records]).runs, options.picture)
