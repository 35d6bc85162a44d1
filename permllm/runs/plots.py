"""Pictures by matplotlib: quality over minutes, the loss curves of what learned, and the masks of one linear."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from permllm.errors import ConfigError, first_line
from permllm.runs.measures import method_of
from permllm.runs.names import MASKS, PERMUTATIONS
from permllm.runs.table import GAP, Table

MINUTES = "minutes: calibrate + permute + mask + prune"
# Colours repeat after so many methods, then with another marker.
_COLOURS, _MARKERS = 10, "osD^v"
# Beside the axes a legend hides nothing.
_LEGEND: Any = {
    "fontsize": "small",
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1.0),
    "borderaxespad": 0.0,
}


@contextmanager
def picture(file: Path, dpi: int = 150) -> Iterator[Any]:
    """Give matplotlib's pyplot without a screen, and write the figure that was drawn with it.

    Raises:
        ConfigError: matplotlib is missing, the file cannot be written, or its suffix is no format
            of a picture.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{file}: pictures need matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a record's texts are no formulas
    from matplotlib import pyplot

    try:
        yield pyplot
        pyplot.gcf().set_layout_engine("constrained")
        # A legend beside the axes is part of the picture.
        pyplot.savefig(file, dpi=dpi, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    finally:
        pyplot.close("all")


def measures_of(table: Table) -> list[str]:
    """Return the measures that are worth minutes: gaps, perplexities, accuracies; gaps that do not compare stand last."""
    others = [name for name in table.measures if table.kinds[name] in ("perplexity", "accuracy")]
    gaps = sorted(
        (name for name in table.measures if name in table.gaps), key=lambda name: name != GAP
    )
    return gaps + others if table.one_start() else others + gaps


def points(table: Table, measure: str) -> pd.DataFrame:
    """Return the points of the picture of quality over minutes.

    Returns:
        By row: `run`, `name`, `method`, `minutes` of `run`, the fastest one, `value`, `error`,
        `memory` in bytes, `front`: no other row is as good in as few minutes. Rows without the
        measure are left out, and those of another run's permutation.
    """
    rows = [
        row
        for row in table.means.index
        if not table.learned_elsewhere(row) and np.isfinite(table.means.at[row, measure])
    ]
    names, several = table.names(), table.labels["pruner"].nunique() > 1
    runs = [table.fastest(row) for row in rows]
    columns = {
        "run": runs,
        "name": [names[row] for row in rows],
        "method": [
            f"{table.label(row, 'pruner')}, " * several + method_of(table.first(row).config)
            for row in rows
        ],
        "minutes": table.frame["minutes"][runs].to_numpy(),
        "value": table.means[measure][rows],
        "error": [table.error(row, measure) or 0.0 for row in rows],
        "memory": [table.memory(row) for row in rows],
    }
    found = pd.DataFrame(columns, rows)
    sign = -1 if table.kinds[measure] in ("accuracy", "share") else 1
    ordered = found.assign(badness=sign * found["value"]).sort_values(["minutes", "badness"])
    found["front"] = ordered["badness"] < ordered["badness"].cummin().shift(fill_value=math.inf)
    return found


def plot_cost(table: Table, file: Path, measure: str | None = None) -> None:
    """Write a picture of quality over minutes: a point a row, peak memory as its area, the Pareto front, the dense model.

    Raises:
        ConfigError: no row has the measure, or the picture cannot be written.
    """
    name, valid = measure or table.main(), measures_of(table)
    if name not in valid:
        raise ConfigError(
            f"{file}: no row has {name or 'a perplexity or an accuracy'}; valid are: {', '.join(valid)}"
        )
    found = points(table, name)
    if found.empty:
        raise ConfigError(f"{file}: no row has {name} and minutes of its own")
    front = found[found["front"]].sort_values("minutes")
    with picture(file, 100) as pyplot:
        _, axis = pyplot.subplots(figsize=(8, 4.8))
        axis.step(
            front["minutes"],
            front["value"],
            where="post",
            linestyle=":",
            color="grey",
            label="Pareto front",
        )
        sizes = 30 + 150 * found["memory"] / max(1, found["memory"].max())
        for number, (method, some) in enumerate(
            found.sort_values("minutes").groupby("method", sort=False)
        ):
            marker = _MARKERS[number // _COLOURS % len(_MARKERS)]
            axis.scatter(
                some["minutes"],
                some["value"],
                sizes[some.index],
                marker=marker,
                label=method,
                alpha=0.8,
            )
        if name in table.dense and math.isfinite(table.dense[name][0]):
            axis.axhline(
                table.dense[name][0], linestyle="--", color="grey", linewidth=1, label="dense"
            )
        axis.margins(x=0.15, y=0.1)
        logarithmic = {
            axis.xaxis: found["minutes"].min() > 0,
            axis.yaxis: table.kinds[name] == "perplexity",
        }
        for one in (one for one, is_so in logarithmic.items() if is_so):
            axis.set(**{f"{one.axis_name}scale": "log"})
            one.set_major_locator(pyplot.LogLocator(subs=(1, 2, 3, 5, 7)))
            one.set_major_formatter("{x:g}")
        axis.minorticks_off()
        if table.kinds[name] == "share":
            axis.yaxis.set_major_formatter("{x:.0%}")
        shared = [{table.label(row, key) for row in found.index} for key in ("model", "sparsity")]
        axis.set_title(
            ", ".join(next(iter(values)) for values in shared if len(values) == 1),
            fontsize="medium",
        )
        axis.set(xlabel=f"{MINUTES} (area: peak of memory)", ylabel=table.heading(name))
        axis.grid(alpha=0.3)
        axis.legend(**_LEGEND)


def plot_curves(table: Table, file: Path) -> None:
    """Write a picture of the loss curves of all rows that learned.

    Raises:
        ConfigError: no run has learned, or the picture cannot be written.
    """
    runs = [(name, table.first(row)) for row, name in enumerate(table.names())]
    learned = [
        (name, [entry.get("loss", math.nan) for entry in run.history])
        for name, run in runs
        if run.history
    ]
    if not learned:
        raise ConfigError(f"{file}: no run has a history of losses")
    with picture(file) as pyplot:
        _, axis = pyplot.subplots(figsize=(7, 4))
        for name, losses in learned:
            axis.plot(range(1, len(losses) + 1), losses, marker=".", label=name[:48])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="epoch", ylabel="loss, mean of the epoch")
        axis.legend(**_LEGEND)


def plot_masks(table: Table, file: Path, linear: str | None = None, size: int = 64) -> None:
    """Write a picture of one linear's mask under every row, its corner in original channel order (PermLLM, figure 3).

    Args:
        table: of runs whose directories hold their masks.
        file: picture; its suffix chooses the format.
        linear: module path, such as `model.layers.0.mlp.down_proj`; None: the first one of the
            middle layer.
        size: rows and columns of the corner.

    Raises:
        ConfigError: no run has masks, there is no such linear, or the picture cannot be written.
        DataError: masks cannot be read.
    """
    from permllm.runs.tensors import load_masks  # torch takes longer to import than all else

    found = []
    for row, title in enumerate(table.names()):
        if (kept := table.first(row).directory / MASKS).is_file():
            masks = load_masks(kept)
            layers = by_layer(masks)
            chosen = linear or layers[len(layers) // 2][0]
            if chosen not in masks:
                raise ConfigError(
                    f"--linear {chosen}: {kept} has no such mask; it has {layers[0][0]}, ..."
                )
            found.append((title, chosen, masks[chosen].numpy()[:size, :size]))
    if not found:
        raise ConfigError(f"{file}: none of the runs has its {MASKS}")
    columns, lines = min(3, len(found)), -(-len(found) // 3)
    with picture(file) as pyplot:
        figure = pyplot.figure(figsize=(3.4 * columns, 3.8 * lines + 0.3))
        for place, (title, _, mask) in enumerate(found, 1):
            axis = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
            axis.imshow(mask, cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
            axis.set_title(title, fontsize="small")
        rows, channels = found[0][2].shape
        caption = (
            f"{found[0][1]}, rows 0 to {rows - 1}, input channels 0 to {channels - 1}, black: kept"
        )
        figure.suptitle(caption, fontsize="small")


def permutations(directory: Path) -> dict[str, NDArray[np.int64]]:
    """Return the permutations of the first, the middle and the last layer of a run by channel group; empty for none."""
    if not (directory / PERMUTATIONS).is_file():
        return {}
    from permllm.runs.tensors import load_orders

    orders = load_orders(directory / PERMUTATIONS)
    layers = by_layer(orders)
    chosen = sorted({0, len(layers) // 2, len(layers) - 1})
    return {name: orders[name].numpy() for layer in chosen for name in layers[layer]}


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Return names of channel groups or linears by decoder layer, in the order of the layers."""
    layers: dict[int, list[str]] = {}
    for name in sorted(names):
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(int(number[1]) if number else -1, []).append(name)
    return [layers[layer] for layer in sorted(layers)]
