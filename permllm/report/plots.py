"""Pictures with matplotlib: quality over minutes, losses, masks of one linear, sensitivities."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from permllm.errors import ConfigError, first_line
from permllm.report.measures import DENSE
from permllm.report.table import Table, shared_value
from permllm.store.files import MASKS

MINUTES = "minutes: calibrate + permute + mask + prune"
_CORNER = 64  # rows and channels of a mask that are drawn
# A legend beside the axes hides no point.
_LEGEND: Any = {
    "fontsize": "small",
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1.0),
    "borderaxespad": 0.0,
}


@contextmanager
def picture(file: Path) -> Iterator[Any]:
    """Yield matplotlib's pyplot, and write the figure that the caller has drawn to a file.

    Raises:
        ConfigError: matplotlib is not installed, the file cannot be written, or its suffix is no
            format of a picture.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{file}: pictures need matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # texts of records may contain dollar signs
    from matplotlib import pyplot

    try:
        yield pyplot
        pyplot.gcf().set_layout_engine("constrained")
        pyplot.savefig(file, dpi=150, bbox_inches="tight")  # with the legend beside the axes
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

    Rows without a finite value, or with a permutation from a file, have no point.

    Returns:
        `name` of the row; `minutes` of its fastest run, because other jobs on the
        machine slow a run down; `value` and `error` of the measure; `memory`, the largest peak in
        bytes of the runs with the compute dtype of the fastest one; `front`, True if no other row
        is as good in as few minutes.
    """
    runs = table.frame.groupby("row")
    fastest = runs["minutes"].idxmin()
    dtypes = pd.Series([run.metrics.get("compute_dtype", "") for run in table.runs])
    peaks = pd.Series([run.metrics["peak_memory_bytes"] for run in table.runs])
    peaks = peaks[dtypes == dtypes[table.frame["row"].map(fastest)].to_numpy()]
    frame = pd.DataFrame(
        {
            "name": table.names(),
            "minutes": runs["minutes"].min(),
            "value": table.means[measure],
            "error": table.errors[measure].fillna(0.0),
            "memory": peaks.groupby(table.frame["row"]).max(),
        },
        table.labels.index,
    )
    # The minutes of a permutation from a file lack those of its making.
    drawn = np.isfinite(frame["value"]) & (table.labels["permutation"] != "from_file")
    frame = frame[drawn]
    sign = -1 if table.kinds[measure] in ("accuracy", "share") else 1
    ordered = frame.assign(badness=sign * frame["value"]).sort_values(["minutes", "badness"])
    best = ordered["badness"].cummin().shift(fill_value=math.inf)
    return frame.assign(front=ordered["badness"] < best)


def undrawn(table: Table, measure: str) -> list[str]:
    """Return a line that names the rows without a point; empty: all rows have one."""
    names = pd.Series(table.names()).drop(points(table, measure).index)
    if names.empty:
        return []
    return [f"not drawn, without a finite {measure} or minutes of their own: {'; '.join(names)}"]


def dense_lines(table: Table, measure: str, rows: pd.Index) -> dict[str, float]:
    """Return the dense model's value of a measure by the label of its line, a line for each model.

    A model whose runs differ in this value, or lack it, has no line.

    Args:
        table: table of the runs.
        measure: a measure of the table.
        rows: rows with a point.
    """
    lines = {}
    frame = table.frame[table.frame["row"].isin(rows)].reindex(columns=["model", DENSE + measure])
    for model, values in frame.groupby("model")[DENSE + measure]:
        value = shared_value(values)
        if value is not None:
            lines["dense" if frame["model"].nunique() == 1 else f"dense, {model}"] = value
    return lines


def plot_cost(table: Table, file: Path, name: str) -> None:
    """Draw a measure over minutes, with a point for each row whose area is the peak memory.

    Raises ConfigError if no row has a point, or the picture cannot be written.
    """
    frame = points(table, name)
    if frame.empty:
        raise ConfigError(f"{file}: no row has both {name} and its own minutes")
    front = frame[frame["front"]].sort_values("minutes")
    frame["area"] = 30 + 150 * frame["memory"] / frame["memory"].max()
    with picture(file) as pyplot:
        _, axis = pyplot.subplots(figsize=(8, 4.8))
        axis.step(
            front["minutes"],
            front["value"],
            where="post",
            linestyle=":",
            color="grey",
            label="Pareto front",
        )
        axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for _, point in frame.sort_values("minutes").iterrows():
            axis.scatter(
                point["minutes"], point["value"], point["area"], label=point["name"], alpha=0.8
            )
        styles = cycle(("--", "-.", ":"))
        for label, value in dense_lines(table, name, frame.index).items():
            axis.axhline(value, linestyle=next(styles), color="grey", linewidth=1, label=label)
        axis.margins(x=0.15, y=0.1)
        axis.set(xscale="log", xlabel=f"{MINUTES} (area: peak of memory)")
        axis.set_ylabel(table.heading(name))
        axis.xaxis.set_major_locator(pyplot.LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        if table.kinds[name] == "share":
            axis.yaxis.set_major_formatter("{x:.0%}")
        axis.grid(alpha=0.3)
        axis.legend(**_LEGEND)


def plot_curves(table: Table, file: Path) -> None:
    """Draw the loss curves of all rows with learning.

    Raises ConfigError if no run has learned, or the picture cannot be written.
    """
    histories = [table.first(row).history for row in table.labels.index]
    if not any(histories):
        raise ConfigError(f"{file}: no run has a history of losses")
    with picture(file) as pyplot:
        _, axis = pyplot.subplots(figsize=(7, 4))
        for name, history in zip(table.names(), histories, strict=True):
            if history:
                losses = [entry["loss"] for entry in history]
                axis.plot(range(1, len(losses) + 1), losses, marker=".", label=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="epoch", ylabel="loss, mean of the epoch")
        axis.legend(**_LEGEND)


def plot_masks(table: Table, file: Path, linear: str | None = None) -> None:
    """Draw the corner of one linear's mask for each row, as in figure 3.

    Args:
        table: table of the runs.
        file: file of the picture.
        linear: path of the linear, such as `model.layers.0.mlp.down_proj`; None: one of the middle
            layer.

    Raises:
        ConfigError: no run has masks, the linear does not exist, or the picture cannot be written.
        DataError: masks cannot be read.
    """
    from permllm.store.tensors import load_masks  # imports torch, which takes seconds

    corners = []
    path = ""
    for row, title in enumerate(table.names()):
        masks_file = table.first(row).directory / MASKS
        if masks_file.is_file():
            masks = load_masks(masks_file)
            names = sorted(masks, key=lambda name: int(re.findall(r"\.(\d+)\.", name)[0]))
            path = linear or names[len(names) // 2]
            if path not in masks:
                raise ConfigError(f"--linear {path}: {masks_file} has {names[0]}, ...")
            corners.append((title, masks[path].numpy()[:_CORNER, :_CORNER]))
    if not corners:
        raise ConfigError(f"{file}: none of the runs has its {MASKS}")
    columns = min(3, len(corners))
    lines = math.ceil(len(corners) / 3)
    with picture(file) as pyplot:
        figure = pyplot.figure(figsize=(3.4 * columns, 3.8 * lines + 0.3))
        for place, (title, mask) in enumerate(corners, 1):
            axis = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
            axis.imshow(mask, cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
            axis.set_title(title, fontsize="small")
        rows, channels = mask.shape
        figure.suptitle(
            f"{path}, rows 0 to {rows - 1}, input channels 0 to {channels - 1}, black: kept",
            fontsize="small",
        )


def plot_sensitivity(table: Table, file: Path) -> None:
    """Draw the sensitivity of each channel group, groups by decoder layers, for each row.

    A cross marks a group that stays dense.

    Raises ConfigError if no run has sensitivities, or the picture cannot be written.
    """
    titles = []
    runs = []
    for row, title in enumerate(table.names()):
        run = table.first(row)
        if "sensitivity" in run.metrics:
            titles.append(title)
            runs.append(run)
    if not runs:
        raise ConfigError(f"{file}: no run has sensitivities; allocation=sensitive measures them")
    with picture(file) as pyplot:
        size = (8, 2.2 * len(runs) + 0.6)
        _, axes = pyplot.subplots(len(runs), squeeze=False, figsize=size, layout="constrained")
        for axis, run, title in zip(axes.flat, runs, titles, strict=True):
            values = pd.Series(run.metrics["sensitivity"], name="value")
            frame = values.index.str.extract(r"\.(?P<layer>\d+)\.(?P<group>.*)")
            frame = frame.assign(layer=frame["layer"].astype(int), value=values.to_numpy())
            groups = list(frame["group"].unique())
            grid = frame.pivot(index="group", columns="layer", values="value").loc[groups]
            image = axis.imshow(grid, norm="log", aspect="auto", cmap="viridis")
            bar = pyplot.colorbar(image, ax=axis, label="nats a token", format="{x:g}")
            bar.locator = pyplot.LogLocator(subs=(1, 2, 5))
            bar.minorticks_off()
            pruned = run.metrics["retained_saliency"]
            dense = frame[[name not in pruned for name in values.index]]
            axis.plot(dense["layer"] - frame["layer"].min(), dense["group"].map(groups.index), "rx")
            axis.set_yticks(range(len(groups)), groups)
            axis.set(xlabel="decoder layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_title(title, fontsize="small")
