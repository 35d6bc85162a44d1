"""Pictures with matplotlib: quality over minutes, losses, masks of one linear, sensitivities."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import IO, Any

import numpy as np
import pandas as pd

from permllm.errors import ConfigError, first_line
from permllm.report.labels import place_labels
from permllm.report.measures import DENSE, number
from permllm.report.table import Table, shared_value
from permllm.settings.config import NMPattern
from permllm.store.files import MASKS

MINUTES = "minutes: calibrate + allocate + permute + mask + prune"
_CORNER = 64  # rows and channels of a mask that are drawn


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
        size: width and height in inches.

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
        _, axis = pyplot.subplots(figsize=size)
        for _, best in front.groupby("model"):
            axis.step(best["minutes"], best["value"], ":", where="post", color="grey", zorder=1)
        for style, (row, point) in zip(_styles(), frame.iterrows(), strict=False):
            at = (point["minutes"], point["value"])
            axis.errorbar(*at, point["error"], color=style["color"], linewidth=1)
            names = {"gid": f"point-{row}", "urls": [f"#row-{row}"]}
            axis.scatter(*at, point["area"], alpha=0.8, **names, **style)
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
        place_labels(
            axis,
            frame["name"] + frame["cached"].map({True: "*", False: ""}),
            frame[["minutes", "value"]].to_numpy(),
        )


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


def plot_curves(table: Table, file: Path | IO[str], rows: pd.Index | None = None) -> None:
    """Draw the loss curves of rows with learning, a line for each run, an axis for each loss.

    Args:
        table: table of the runs.
        file: file of the picture.
        rows: rows to draw; None: all.

    Raises:
        ConfigError: no run has learned, or the picture cannot be written.
    """
    names = table.names()
    epochs = []
    for row in table.labels.index if rows is None else rows:
        for place in table.members(row).index:
            run = table.runs[place]
            for entry in run.history:
                group = entry.get("group", "")
                loss = run.config.get(group or "permutation", {}).get("loss") or "loss"
                title = f"{group} {loss}".strip()
                epochs.append({"title": title, "row": row, "run": place, "loss": entry["loss"]})
    if not epochs:
        raise ConfigError(f"{file}: no run has a history of losses")
    curves = pd.DataFrame(epochs).groupby("title", sort=False)
    with picture(file) as pyplot:
        size = (7, 3.2 * len(curves))
        _, axes = pyplot.subplots(len(curves), squeeze=False, figsize=size)
        for axis, (title, lines) in zip(axes.flat, curves, strict=True):
            by_row = lines.groupby("row", sort=False)
            for style, (_, of_row) in zip(_styles(), by_row, strict=False):
                for _, losses in of_row.groupby("run", sort=False)["loss"]:
                    axis.plot(range(1, len(losses) + 1), losses, markersize=4, **style)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel="epoch", ylabel=f"{title}, mean of the epoch")
            axis.set_xlim(0.5, axis.dataLim.xmax + 0.5)
            if rows is None:
                firsts = lines[lines["run"] == by_row["run"].transform("first")]
                ends = firsts.groupby("row", sort=False)["loss"].agg(["size", "last"])
                place_labels(axis, [names[row] for row in ends.index], ends.to_numpy())


def plot_masks(table: Table, file: Path, linear: str | None = None) -> None:
    """Draw the corner of one linear's mask for each row, as in figure 3, with lines every M.

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

    corners: list[tuple[str, Any, int]] = []
    path = ""
    for row, title in enumerate(table.names()):
        run = table.first(row)
        if len(table.members(row)) > 1:
            title += f", seed {run.config['seed']}"
        masks_file = run.directory / MASKS
        if masks_file.is_file():
            masks = load_masks(masks_file)
            names = sorted(masks, key=lambda name: int(re.findall(r"\.(\d+)\.", name)[0]))
            path = linear or names[len(names) // 2]
            if path not in masks:
                raise ConfigError(f"--linear {path}: {masks_file} has {names[0]}, ...")
            pattern = run.metrics["sparsity"].get("patterns", {}).get(path, run.config["sparsity"])
            width = _CORNER if pattern == "dense" else NMPattern.parse(pattern).m
            corners.append((title, masks[path].numpy()[:_CORNER, :_CORNER], width))
    if not corners:
        raise ConfigError(f"{file}: none of the runs has its {MASKS}")
    columns = min(3, len(corners))
    lines = math.ceil(len(corners) / 3)
    with picture(file) as pyplot:
        figure = pyplot.figure(figsize=(3.4 * columns, 3.8 * lines + 0.3))
        for place, (title, mask, width) in enumerate(corners, 1):
            axis = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
            axis.imshow(mask, cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
            for channel in range(width, mask.shape[1], width):
                axis.axvline(channel - 0.5, color="C1", linewidth=0.5)
            axis.set_title(fill(title, 40), fontsize="small")
        rows, channels = mask.shape
        figure.suptitle(
            f"{path}, rows 0 to {rows - 1}, input channels 0 to {channels - 1}, black: kept, "
            "lines: every M",
            fontsize="small",
        )


def plot_sensitivity(table: Table, file: Path) -> None:
    """Draw the sensitivity of each channel group, groups by decoder layers, for each row.

    A cross marks a group that the allocation keeps dense, and what `keep_dense` keeps is blank.

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
        _, axes = pyplot.subplots(len(runs), squeeze=False, figsize=size)
        for axis, run, title in zip(axes.flat, runs, titles, strict=True):
            values = pd.Series(run.metrics["sensitivity"], name="value")
            frame = values.index.str.extract(r"\.(?P<layer>\d+)\.(?P<group>.*)")
            frame = frame.assign(layer=frame["layer"].astype(int), value=values.to_numpy())
            groups = list(frame["group"].unique())
            grid = frame.pivot(index="group", columns="layer", values="value").loc[groups]
            grid = grid.reindex(columns=range(frame["layer"].max() + 1))  # keep_dense has gaps
            image = axis.imshow(grid, norm="log", aspect="auto", cmap="viridis")
            bar = pyplot.colorbar(image, ax=axis, label="nats a token", format="{x:g}")
            bar.locator = pyplot.LogLocator(subs=(1, 2, 5))
            bar.minorticks_off()
            pruned = run.metrics["retained_saliency"]
            dense = frame[[name not in pruned for name in values.index]]
            axis.plot(dense["layer"], dense["group"].map(groups.index), "rx")
            axis.set_yticks(range(len(groups)), groups)
            axis.set(xlabel="decoder layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_title(fill(title, 90), fontsize="small")
