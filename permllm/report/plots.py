"""Picture with matplotlib: quality over minutes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from permllm.errors import ConfigError, first_line
from permllm.report.measures import DENSE, number
from permllm.report.table import Table, shared_value

MINUTES = "minutes, from calibration to pruning"
# Inches: smallest width of a picture with names on its right side, and height of a name.
_WIDE = 6.0
_LINE = 0.2


@contextmanager
def picture(file: Path | IO[str]) -> Iterator[Any]:
    """Yield matplotlib's pyplot, and write the figure that the caller has drawn to a file.

    Raises:
        ConfigError: the file cannot be written, or its suffix is no format of a picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # texts of records may contain dollar signs
    matplotlib.rcParams["figure.constrained_layout.use"] = True
    from matplotlib import pyplot

    try:
        yield pyplot
        pyplot.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    finally:
        pyplot.close("all")


def drawn_measure(table: Table, measure: str | None) -> str:
    """Return the measure to draw over minutes; None: the main measure.

    Raises ConfigError if no row has the measure.
    """
    name = measure or table.main() or "a perplexity or an accuracy"
    if name not in table.measures:
        raise ConfigError(f"no row has {name}; valid are: {', '.join(table.measures)}")
    return name


def points(table: Table, measure: str) -> pd.DataFrame:
    """Return the points of quality over minutes, by row.

    Rows without a finite value or minutes, or with a permutation from a file, have no point.

    Returns:
        `name` of the row; `minutes` of its fastest run, because other jobs on the
        machine slow a run down; `value` and `error` of the measure; `memory`, the largest peak in
        bytes of the runs with the compute dtype of the fastest one; `model`; `front`, True if no
        other row of the model is as good in as few minutes; `cached`, True if the fastest run has
        recorded that a part of its calibration or allocation came from the cache.
    """
    runs = table.frame.groupby("row")
    fastest = runs["minutes"].idxmin()
    dtypes = pd.Series([run.metrics.get("compute_dtype", "") for run in table.runs])
    peaks = pd.Series([run.metrics["peak_memory_bytes"] for run in table.runs])
    peaks = peaks[dtypes == dtypes[table.frame["row"].map(fastest)].to_numpy()]
    cached = pd.Series([any(run.metrics.get("cached", {}).values()) for run in table.runs])
    frame = pd.DataFrame(
        {
            "name": table.names(),
            "model": table.labels["model"],
            "cached": cached[fastest].to_numpy(),
            "minutes": runs["minutes"].min(),
            "value": table.means[measure],
            "error": table.errors[measure].fillna(0.0),
            "memory": peaks.groupby(table.frame["row"]).max(),
        },
        table.labels.index,
    )
    # The minutes of a permutation from a file lack those of its making.
    drawn = np.isfinite(frame["value"]) & (table.labels["permutation"] != "from_file")
    frame = frame[drawn & (frame["minutes"] > 0)]
    sign = -1 if table.kinds[measure] in ("accuracy", "share") else 1
    ordered = frame.assign(badness=sign * frame["value"]).sort_values(["minutes", "badness"])
    best = ordered.groupby("model")["badness"].cummin()
    before = best.groupby(ordered["model"]).shift(fill_value=math.inf)
    return frame.assign(front=ordered["badness"] < before)


def undrawn(table: Table, measure: str) -> list[str]:
    """Return a line about the rows without a point; empty: all rows have one.

    Rows that have other measures are counted, and the others are named.
    """
    names = pd.Series(table.names()).drop(points(table, measure).index)
    if names.empty:
        return []
    lacking = table.means.loc[names.index, measure].isna()
    rows = [*names[~lacking]]
    if lacking.any():
        rows.append(f"{lacking.sum()} of {len(table.labels)} rows, which have other measures")
    return [f"not drawn, without a finite {measure} or minutes of their own: {'; '.join(rows)}"]


def dense_lines(table: Table, measure: str, rows: pd.Index) -> dict[str, float]:
    """Return the dense model's value of a measure by the label of its line, a line for each model.

    A model whose runs differ in this value, or lack it, has no line. It closes a whole gap.

    Args:
        table: table of the runs.
        measure: a measure of the table.
        rows: rows with a point.
    """
    if measure in table.gaps:
        return {"dense": 1.0}
    lines = {}
    frame = table.frame[table.frame["row"].isin(rows)].reindex(columns=["model", DENSE + measure])
    for model, values in frame.groupby("model")[DENSE + measure]:
        value = shared_value(values)
        if value is not None:
            lines["dense" if frame["model"].nunique() == 1 else f"dense, {model}"] = value
    return lines


def plot_cost(
    table: Table,
    file: Path | IO[str],
    name: str,
    size: tuple[float, float] = (9, 5.5),
) -> None:
    """Draw a measure over minutes, with a point for each row whose area is the peak memory.

    Args:
        table: table of the runs.
        file: file of the picture.
        name: a measure of the table.
        size: width and height in inches, without names that stand below a narrow picture.

    Raises:
        ConfigError: no row has a point, or the picture cannot be written.
    """
    frame = points(table, name).sort_values("minutes")
    if frame.empty:
        raise ConfigError(f"{file}: no row has both {name} and its own minutes")
    kind = table.kinds[name]
    front = frame[frame["front"]]
    frame["area"] = 30 + 90 * frame["memory"] / frame["memory"].max()
    with picture(file) as pyplot:
        width, height = size
        is_narrow = width < _WIDE
        if is_narrow:  # the names stand below
            height += _LINE * len(frame)
        figure, axis = pyplot.subplots(figsize=(width, height))
        for _, best in front.groupby("model"):
            axis.step(best["minutes"], best["value"], ":", where="post", color="grey", zorder=1)
        for style, (row, point) in zip(_styles(), frame.iterrows(), strict=False):
            at = (point["minutes"], point["value"])
            axis.errorbar(*at, point["error"], color=style["color"], linewidth=1)
            names = {"gid": f"point-{row}", "urls": [f"#row-{row}"]}
            label = point["name"] + "*" * point["cached"]
            axis.scatter(*at, point["area"], alpha=0.8, label=label, **names, **style)
        axis.margins(x=0.12, y=0.12)
        _set_logarithmic(axis.xaxis, "x", frame["minutes"])
        dense = dense_lines(table, name, frame.index)
        if kind == "perplexity":
            _set_logarithmic(axis.yaxis, "y", [*frame["value"], *dense.values()])
        for dashes, (label, value) in zip(cycle(("--", "-.", ":")), dense.items(), strict=False):
            axis.axhline(value, linestyle=dashes, color="grey", linewidth=1)
            text = f" {label}: {number(value, kind)}"
            place = axis.get_yaxis_transform()
            axis.text(0, value, text, transform=place, va="bottom", fontsize="small")
        if kind in ("accuracy", "share"):
            axis.yaxis.set_major_formatter("{x:.0%}")
        star = "; *: calibration or allocation from the cache" if frame["cached"].any() else ""
        axis.set_xlabel(f"{MINUTES}\narea: peak of memory; dotted: Pareto front{star}")
        axis.set_ylabel(table.heading(name))
        axis.grid(alpha=0.3)
        side = "outside lower left" if is_narrow else "outside right upper"
        figure.legend(loc=side, fontsize="small", markerscale=0.8, frameon=False)


def _styles() -> Iterator[dict[str, Any]]:
    """Give colours and markers, a colour again only with another marker."""
    for marker in cycle("oDs^vPX"):
        for place in range(10):
            yield {"color": f"C{place}", "marker": marker}


def _set_logarithmic(axis: Any, which: str, values: Any) -> None:
    """Make an axis, x or y, logarithmic with ticks at round numbers."""
    from matplotlib import ticker

    axis.axes.set(**{f"{which}scale": "log"})
    ratio = max(values) / min(values)
    if ratio < 3:
        axis.set_major_locator(ticker.MaxNLocator(6))
    else:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7) if ratio < 20 else (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())
