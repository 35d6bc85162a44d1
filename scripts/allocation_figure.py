"""Draw quality over the speed limit for shares of dense weights, one line for each method.

python scripts/allocation_figure.py RECORDS.jsonl CURVE.png
"""

import argparse
from pathlib import Path

from permllm.report.gaps import GAP
from permllm.report.measures import SPEED_LIMIT
from permllm.report.plots import picture
from permllm.report.read import collect
from permllm.report.table import Table, table_of

# Row at which the gap is 0 %.
_BASELINE = "method=wanda,allocation=uniform,sparsity=2:4,keep_dense="


def draw(table: Table, file: Path) -> None:
    """Draw the gap closed over the speed limit."""
    rows = table.labels[["method", "sparsity", "keep_dense"]].assign(
        speed=table.means[SPEED_LIMIT], gap=table.means[GAP], error=table.errors[GAP].fillna(0.0)
    )
    with picture(file) as pyplot:
        _, axis = pyplot.subplots(figsize=(8, 5))
        chosen_by_name = rows["keep_dense"] != ""
        for (sparsity, by_name, method), points in rows.groupby(
            ["sparsity", chosen_by_name, "method"]
        ):
            label = method if sparsity == "2:4" else f"{method}, {sparsity} everywhere"
            label += ", first and last layers dense" if by_name else ""
            ordered = points.sort_values("speed")
            style = "o-" if len(ordered) > 2 else "D"
            axis.errorbar(
                ordered["speed"], ordered["gap"], ordered["error"], fmt=style, label=label
            )
        axis.set(xlabel="speed limit: weights / nonzero weights", ylabel=GAP)
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(table_of(collect([options.records]).runs, _BASELINE), options.picture)
