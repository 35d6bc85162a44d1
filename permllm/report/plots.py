"""Pictures with matplotlib: quality over minutes, loss curves, and the masks of one linear."""

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
from permllm.report.table import DENSE, Table
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
    valid = [
        name
        for name in table.measures
        if name in table.gaps or table.kinds[name] in ("perplexity", "accuracy")
    ]
    name = measure or table.main()
    if name is None or name not in valid:
        raise ConfigError(
            f"no row has {name or 'a perplexity or an accuracy'}; valid are: {', '.join(valid)}"
        )
    return name


def points(table: Table, measure: str) -> pd.DataFrame:
    """Return the points of quality over minutes, by row.

    Some rows have no point (`undrawn`).

    Returns:
        `name` and `method` of the row; `minutes` of its fastest run, because other jobs on the
        machine slow a run down; `value` and `error` of the measure; `memory`, the largest peak in
        bytes of the runs with the compute dtype of the fastest one; `front`, True if no other row
        is as good in as few minutes.
    """
    names = table.names()
    varying = [name for name in ("model", "pruner") if table.labels[name].nunique() > 1]
    lines = {}
    for row, members in enumerate(table.rows):
        if _why_undrawn(table, row, measure):
            continue
        fastest = table.runs[int(table.frame["minutes"][members].idxmin())]
        alike = [
            metrics
            for metrics in (table.runs[run].metrics for run in members)
            if metrics.get("compute_dtype") == fastest.metrics.get("compute_dtype")
        ]
        settings = [table.label(row, name) for name in varying]
        lines[row] = {
            "name": names[row],
            "method": ", ".join([*settings, table.first(row).methods]),
            "minutes": fastest.minutes,
            "value": table.means.at[row, measure],
            "error": table.error(row, measure) or 0.0,
            "memory": max(metrics["peak_memory_bytes"] for metrics in alike),
        }
    frame = pd.DataFrame.from_dict(lines, orient="index")
    if lines:
        sign = -1 if table.kinds[measure] in ("accuracy", "share") else 1
        ordered = frame.assign(badness=sign * frame["value"]).sort_values(["minutes", "badness"])
        frame["front"] = ordered["badness"] < ordered["badness"].cummin().shift(fill_value=math.inf)
    return frame


def undrawn(table: Table, measure: str) -> list[str]:
    """Return a line for each reason why rows have no point, with the names of the rows."""
    rows: dict[str, list[str]] = {}
    for row, name in enumerate(table.names()):
        if reason := _why_undrawn(table, row, measure):
            rows.setdefault(reason, []).append(name)
    return [f"not drawn, {reason}: {'; '.join(names)}" for reason, names in rows.items()]


def _why_undrawn(table: Table, row: int, measure: str) -> str:
    """Return the reason why a row has no point; empty: it has one."""
    if table.label(row, "permutation") == "from_file":
        return "because their minutes lack those of the permutation"
    if not math.isfinite(table.means.at[row, measure]):
        return f"because they have no finite {measure}"
    return ""


def dense_lines(table: Table, measure: str, rows: pd.Index) -> dict[str, float]:
    """Return the dense model's value of a measure by the label of its line, a line for each model.

    A model whose runs differ in this value, or lack it, has no line.

    Args:
        table: table of the runs.
        measure: a measure of the table.
        rows: rows with a point.
    """
    lines = {}
    models = table.labels["model"].loc[rows]
    for model, alike in models.groupby(models):
        runs = [run for row in alike.index for run in table.rows[row]]
        values = table.frame.reindex(columns=[f"{DENSE}{measure}"]).loc[runs].squeeze(axis=1)
        # Machines differ in the order of sums.
        if math.isfinite(values.iloc[0]) and np.isclose(values, values.iloc[0], rtol=1e-4).all():
            label = "dense" if models.nunique() == 1 else f"dense, {model}"
            lines[label] = float(values.iloc[0])
    return lines


def plot_cost(table: Table, file: Path, measure: str | None = None) -> None:
    """Draw quality over minutes, with a point for each row whose area is the peak memory.

    Raises ConfigError if no row has the measure, or the picture cannot be written.
    """
    name = drawn_measure(table, measure)
    frame = points(table, name)
    if frame.empty:
        raise ConfigError(f"{file}: no row has both {name} and its own minutes")
    front = frame[frame["front"]].sort_values("minutes")
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
        frame["area"] = 30 + 150 * frame["memory"] / max(1, frame["memory"].max())
        methods = frame.sort_values("minutes").groupby("method", sort=False)
        axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for method, some in methods:
            axis.scatter(some["minutes"], some["value"], some["area"], label=method, alpha=0.8)
        styles = cycle(("--", "-.", ":"))
        for label, value in dense_lines(table, name, frame.index).items():
            axis.axhline(value, linestyle=next(styles), color="grey", linewidth=1, label=label)
        axis.margins(x=0.15, y=0.1)
        logarithmic = [axis.xaxis]
        if table.kinds[name] == "perplexity":
            logarithmic.append(axis.yaxis)
        for scale in logarithmic:
            axis.set(**{f"{scale.axis_name}scale": "log"})
            scale.set_major_locator(pyplot.LogLocator(subs=(1, 2, 3, 5, 7)))
            scale.set_major_formatter("{x:g}")
        axis.minorticks_off()
        if table.kinds[name] == "share":
            axis.yaxis.set_major_formatter("{x:.0%}")
        labels = table.labels.loc[frame.index].filter(["model", "sparsity"])
        shared = [values.iloc[0] for _, values in labels.items() if values.nunique() == 1]
        axis.set_title(", ".join(shared), fontsize="medium")
        axis.set(xlabel=f"{MINUTES} (area: peak of memory)", ylabel=table.heading(name))
        axis.grid(alpha=0.3)
        axis.legend(**_LEGEND)


def plot_curves(table: Table, file: Path) -> None:
    """Draw the loss curves of all rows with learning.

    Raises ConfigError if no run has learned, or the picture cannot be written.
    """
    runs = [table.first(row) for row in table.labels.index]
    if not any(run.history for run in runs):
        raise ConfigError(f"{file}: no run has a history of losses")
    with picture(file) as pyplot:
        _, axis = pyplot.subplots(figsize=(7, 4))
        for name, run in zip(table.names(), runs, strict=True):
            if losses := [entry.get("loss", math.nan) for entry in run.history]:
                axis.plot(range(1, len(losses) + 1), losses, marker=".", label=name[:48])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="epoch", ylabel="loss, mean of the epoch")
        axis.legend(**_LEGEND)


def plot_masks(table: Table, file: Path, linear: str | None = None) -> None:
    """Draw the corner of one linear's mask for each row, as in figure 3.

    Args:
        table: table of the runs.
        file: file of the picture.
        linear: path of the linear, such as `model.layers.0.mlp.down_proj`; None: the first linear
            of the middle layer.

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
            first_of_layer = {_layer(name): name for name in sorted(masks, reverse=True)}
            layers = sorted(first_of_layer)
            path = linear or first_of_layer[layers[len(layers) // 2]]
            if path not in masks:
                first = first_of_layer[layers[0]]
                raise ConfigError(f"--linear {path}: {masks_file} has {first}, ...")
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


def _layer(name: str) -> int:
    """Return the index of the decoder layer of a linear; -1: the path has none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1
