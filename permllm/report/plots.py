"""Picture with matplotlib: quality over minutes, a panel for each model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from cycler import cycler

from permllm.errors import ConfigError, first_line
from permllm.report.metrics import number
from permllm.report.table import Table, main_metric, row_names, shared_dense


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


def drawn_metric(table: Table, metric: str | None) -> str:
    """Return the metric to draw over minutes; None: the main metric.

    Raises ConfigError if no row has the metric.
    """
    name = metric or main_metric(table, table.usual) or "a perplexity or an accuracy"
    if name not in table.usual:
        raise ConfigError(f"no row has {name}; valid are: {', '.join(table.usual)}")
    return name


def points(table: Table, metric: str) -> pd.DataFrame:
    """Return the points of quality over minutes, by row.

    Rows without a finite value or minutes, or with a permutation from a file, have no point.

    Returns:
        `name` of the row; `minutes` of its fastest run, because other jobs on the
        machine slow a run down; `value` and `error` of the metric; `memory`, the largest peak in
        bytes of the runs with the compute dtype of the fastest one; `model`; `front`, True if no
        other row of the model is as good in as few minutes; `cached`, True if the fastest run has
        recorded that a part of its calibration or allocation came from the cache.
    """
    lines = []
    for row in table.labels.index:
        runs = table.members(row)
        fastest = min(runs, key=lambda run: run.minutes)
        dtype = fastest.metrics.get("compute_dtype")
        alike = [run.metrics for run in runs if run.metrics.get("compute_dtype") == dtype]
        lines.append(
            {
                "minutes": fastest.minutes,
                "memory": max(metrics["peak_memory_bytes"] for metrics in alike),
                "cached": any(fastest.metrics.get("cached", {}).values()),
            }
        )
    frame = pd.DataFrame(lines).assign(
        name=row_names(table.labels),
        model=table.labels["model"],
        value=table.means[metric],
        error=table.errors[metric].fillna(0.0),
    )
    # The minutes of a permutation from a file lack those of its making.
    drawn = np.isfinite(frame["value"]) & (table.labels["permutation"] != "from_file")
    frame = frame[drawn & (frame["minutes"] > 0)]
    sign = -1 if table.kind(metric) in ("accuracy", "share") else 1
    ordered = frame.assign(badness=sign * frame["value"]).sort_values(["minutes", "badness"])
    best = ordered.groupby("model")["badness"].cummin()
    before = best.groupby(ordered["model"]).shift(fill_value=math.inf)
    return frame.assign(front=ordered["badness"] < before)


def undrawn(table: Table, metric: str) -> list[str]:
    """Return a line with the number of rows without a point; empty: all rows have one."""
    rows = len(table.labels)
    count = rows - len(points(table, metric))
    if count == 0:
        return []
    return [
        f"{count} of {rows} rows are not drawn, without a finite {metric} or minutes of their own"
    ]


def dense_value(table: Table, metric: str, points: pd.DataFrame) -> float | None:
    """Return the dense model's value of a metric; None if the runs of the points differ in it.

    It closes a whole gap.
    """
    if metric in table.gaps:
        return 1.0
    lines = table.measured[table.measured["row"].isin(points.index)]
    return shared_dense(lines)["value"].get(metric)


def plot_cost(table: Table, file: Path | IO[str], name: str, only_model: str | None = None) -> None:
    """Draw a metric over minutes, a panel for each model.

    A point is a row, with its peak memory as the area. A method has one colour in all panels.

    Args:
        table: table of the runs.
        file: file of the picture.
        name: a metric of the table.
        only_model: model to draw; None: all models that have a point.

    Raises:
        ConfigError: no row has a point, or the picture cannot be written.
    """
    frame = points(table, name).sort_values("minutes")
    if frame.empty:
        raise ConfigError(f"{file}: no row has both {name} and its own minutes")
    frame["method"] = [
        row.removeprefix(f"{model}, ")
        for row, model in zip(frame["name"], frame["model"], strict=True)
    ]
    markers = cycler(marker=[*"oDs^vPX"]) * cycler(color=[f"C{place}" for place in range(10)])
    styles = dict(zip(frame["method"].unique(), cycle(markers), strict=False))
    frame["area"] = 30 + 90 * frame["memory"] / frame["memory"].max()
    if only_model:
        frame = frame[frame["model"] == only_model]
    panels = dict([*frame.groupby("model", sort=False)])
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    entries = math.ceil(frame["method"].nunique() / columns)
    size = (5 * columns, 3.6 * lines + 0.2 * entries)
    with picture(file) as pyplot:
        figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
        handles: dict[str, Any] = {}
        for axis, (model, part) in zip(axes.flat, panels.items(), strict=False):
            handles |= _draw_panel(axis, table, name, part, styles)
            axis.set_title(model, fontsize="medium")
        for spare in axes.flat[len(panels) :]:
            spare.set_visible(False)
        place: Any = {"loc": "outside lower left", "ncols": columns}
        figure.legend(handles.values(), handles, fontsize="small", frameon=False, **place)


def _draw_panel(
    axis: Any, table: Table, name: str, frame: pd.DataFrame, styles: dict[str, Any]
) -> dict[str, Any]:
    """Draw the points of a model, and return the handles for the legend by method."""
    kind = table.kind(name)
    best = frame[frame["front"]]
    axis.step(best["minutes"], best["value"], ":", where="post", color="grey", zorder=1)
    handles = {}
    for row, point in frame.iterrows():
        style = styles[point["method"]]
        at = (point["minutes"], point["value"])
        axis.errorbar(*at, point["error"], color=style["color"], linewidth=1)
        label = point["method"] + "*" * point["cached"]
        handles[label] = axis.scatter(*at, point["area"], alpha=0.8, gid=f"point-{row}", **style)
    axis.margins(x=0.12, y=0.12)
    _set_logarithmic(axis.xaxis, "x", frame["minutes"])
    heights = [*frame["value"]]
    dense = dense_value(table, name, frame)
    if dense is not None:
        heights.append(dense)
        axis.axhline(dense, linestyle="--", color="grey", linewidth=1)
        text = f" dense: {number(dense, kind)}"
        place = axis.get_yaxis_transform()
        axis.text(0, dense, text, transform=place, va="bottom", fontsize="small")
    if kind == "perplexity":
        _set_logarithmic(axis.yaxis, "y", heights)
    if kind in ("accuracy", "share"):
        axis.yaxis.set_major_formatter("{x:.0%}")
    axis.set_xlabel("minutes")
    axis.set_ylabel(table.heading(name))
    axis.grid(alpha=0.3)
    return handles


def _set_logarithmic(axis: Any, which: str, values: Any) -> None:
    """Make an axis, x or y, logarithmic with ticks at round numbers."""
    from matplotlib import ticker

    axis.axes.set(**{f"{which}scale": "log"})
    several = max(values) / min(values) >= 3
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if several else ticker.MaxNLocator(6))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())
