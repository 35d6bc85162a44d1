"""Pictures of a summary: quality over minutes, the loss curves of what learned, and the masks of one layer."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError
from permllm.runs import cost
from permllm.runs.names import MASKS
from permllm.runs.pictures import by_layer
from permllm.runs.plotting import load_pyplot, save_figure
from permllm.runs.render import heading, main_measure
from permllm.runs.table import Row, Summary, row_labels

# What a legend inside of the axes has room for, and a label.
_IN_A_LEGEND, _LETTERS = 6, 48
# Of matplotlib, which then begins anew.
_COLOURS, _MARKERS = 10, "osD^vPX*<>"


def plot_curves(summary: Summary, file: Path) -> None:
    """Write a picture of the loss curves of all rows that learned; its suffix chooses the format.

    Raises:
        ConfigError: matplotlib is missing, no run has learned, or the suffix is no format of a picture.
    """
    pyplot = load_pyplot("--curves")
    from matplotlib import ticker

    labels = row_labels(summary)
    learned = [(label, curve) for row, label in zip(summary.rows, labels, strict=True) if (curve := losses(row))]
    if not learned:
        raise ConfigError(f"--curves {file}: no run has a history of losses")
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for number, (label, curve) in enumerate(learned):
        curve = [loss if math.isfinite(loss) else math.nan for loss in curve]
        axis.plot(range(1, len(curve) + 1), curve, label=_cut(label), **_look(number))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="loss, mean of the epoch")
    _legend(axis, "best")
    save_figure(figure, "--curves", file)


def plot_cost(summary: Summary, file: Path, measure: str | None = None) -> None:
    """Write a picture of quality over minutes: a point a row, peak memory as its area, the Pareto front, the dense model.

    Its suffix chooses the format; a PNG holds what is drawn as JSON, in its text `data`.

    Raises:
        ConfigError: matplotlib is missing, the rows have no such measure or time of their own, or the suffix is no format.
    """
    pyplot = load_pyplot("--to")
    from matplotlib import ticker

    name = measure or main_measure(summary)
    if name is None:
        raise ConfigError(f"--to {file}: the runs have neither a perplexity nor an accuracy")
    if name not in cost.measures(summary):
        raise ConfigError(f"--measure {name}: valid are {', '.join(cost.measures(summary))}")
    found, lower = cost.points(summary, name), cost.lower_is_better(summary, name)
    if not found:
        raise ConfigError(f"--to {file}: no row has {name} and minutes of its own")
    best = cost.front(found, lower)
    figure, axis = pyplot.subplots(figsize=(8, 4.8))
    axis.step(
        [p.minutes for p in best], [p.value for p in best], where="post", linestyle=":", color="grey", label="Pareto front"
    )
    largest = max([1, *(point.memory for point in found)])
    methods = cost.methods(summary)
    in_order = dict.fromkeys(methods[point.row] for point in sorted(found, key=lambda point: point.minutes))
    for number, method in enumerate(in_order):
        some = [point for point in found if methods[point.row] == method]
        sizes = [30 + 150 * point.memory / largest for point in some]
        axis.scatter([p.minutes for p in some], [p.value for p in some], sizes, label=method, alpha=0.8, **_look(number))
    named = found if len(found) <= 12 else best
    if all(point.label == methods[point.row] for point in found):
        named = []  # the legend says it
    middle = math.sqrt(min(point.minutes for point in found) * max(point.minutes for point in found))
    for number, point in enumerate(sorted(named, key=lambda point: (point.minutes, point.value))):
        # Above and below in turn, as neighbours often are at one place; to the left of what is slow, where there is room.
        slow = point.minutes > middle
        offset, side = (-6 if slow else 6, -13 if number % 2 else 6), "right" if slow else "left"
        axis.annotate(
            point.label[:32], (point.minutes, point.value), offset, textcoords="offset points", ha=side, fontsize="small"
        )
    if name in summary.dense and math.isfinite(summary.dense[name].mean):
        axis.axhline(summary.dense[name].mean, linestyle="--", color="grey", linewidth=1, label="dense")
    if min(point.minutes for point in found) > 0:
        axis.set_xscale("log")
    if cost.kind(summary, name) == "perplexity":
        axis.set_yscale("log")
    for one in (axis.xaxis, axis.yaxis) if cost.kind(summary, name) == "perplexity" else (axis.xaxis,):
        one.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
        one.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        one.set_minor_locator(ticker.NullLocator())
    if cost.kind(summary, name) == "share":
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    axis.margins(x=0.15, y=0.1)
    configs = [summary.rows[point.row].runs[0].config for point in found]
    shared = [{config["model"]["name"] for config in configs}, {config["sparsity"] for config in configs}]
    axis.set_title(", ".join(str(next(iter(values))) for values in shared if len(values) == 1), fontsize="medium")
    axis.set(xlabel=f"{cost.MINUTES} (area: peak of memory)", ylabel=heading(summary, name))
    axis.grid(alpha=0.3)
    _legend(axis, "lower left" if lower else "upper left")
    save_figure(figure, "--to", file, 100, json.dumps(cost_data(summary, name), sort_keys=True))


def cost_data(summary: Summary, measure: str) -> dict[str, Any]:
    """What `plot_cost` draws of a measure, rounded to what a picture shows."""
    found = cost.points(summary, measure)
    rows = [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in asdict(p).items()} for p in found
    ]
    best = [point.row for point in cost.front(found, cost.lower_is_better(summary, measure))]
    return {"measure": measure, "points": rows, "front": best}


def plot_masks(summary: Summary, file: Path, linear: str | None = None, size: int = 64) -> None:
    """Write a picture of one linear's mask under every row, its corner in original channel order (PermLLM, figure 3).

    Args:
        summary: of runs whose directories hold their masks.
        file: its suffix chooses the format.
        linear: module path, such as `model.layers.0.mlp.down_proj`; None is the first one of the middle layer.
        size: rows and columns of the corner.

    Raises:
        ConfigError: matplotlib is missing, no run has masks, there is no such linear, or the suffix is no format of a picture.
    """
    pyplot = load_pyplot("--masks")
    from permllm.runs.run_tensors import mask_names, mask_reader

    found = []
    for row, title in zip(summary.rows, row_labels(summary), strict=True):
        masks = row.runs[0].directory / MASKS
        names = mask_names(masks) if masks.is_file() else []
        if names:
            chosen = linear or _first_of_the_middle_layer(names)
            if chosen not in names:
                raise ConfigError(f"--linear {chosen}: {row.runs[0].directory} has no such mask; it has {names[0]}, ...")
            found.append((title, chosen, mask_reader(masks)(chosen)[:size, :size]))
    if not found:
        raise ConfigError(f"--masks: none of the runs has its {MASKS}")
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 3.8 * lines + 0.3), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (title, _, mask) in zip(axes.flat, found, strict=False):
        axis.imshow(mask.numpy(), cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
        axis.set_title(title, fontsize="small")
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{found[0][1]}, rows and input channels 0 to {size - 1}, black: kept", fontsize="small")
    save_figure(figure, "--masks", file)


def _first_of_the_middle_layer(names: list[str]) -> str:
    layers = by_layer(names)
    return layers[sorted(layers)[len(layers) // 2]][0]


def numeric_setting(summary: Summary) -> str | None:
    """The one setting that varies, if it is a number everywhere."""
    if len(summary.settings) != 1 or len(summary.rows) < 2:
        return None
    (name,) = summary.settings
    try:
        return name if all(math.isfinite(float(row.labels[name])) for row in summary.rows) else None
    except ValueError:
        return None


def losses(row: Row) -> list[float]:
    """Mean loss of each epoch of a row's first run."""
    return [entry["loss"] for entry in row.runs[0].history]


def _look(number: int) -> dict[str, str]:
    """A colour and a marker that no other of the first hundred has together."""
    return {"color": f"C{number % _COLOURS}", "marker": _MARKERS[number // _COLOURS % len(_MARKERS)]}


def _legend(axis: Any, place: str) -> None:
    """Inside, or beside the axes where it would hide what is drawn."""
    if len(axis.get_legend_handles_labels()[1]) <= _IN_A_LEGEND:
        axis.legend(fontsize="small", loc=place)
    else:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _cut(label: str) -> str:
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
