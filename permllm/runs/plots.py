"""Pictures by matplotlib: quality over minutes, the loss curves of what learned, and the masks of one linear."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from permllm.errors import ConfigError, DataError, first_line
from permllm.runs.measures import method_of
from permllm.runs.names import MASKS, PERMUTATIONS
from permllm.runs.table import GAP, Table

MINUTES = "minutes: calibrate + permute + mask + prune"
# Beside the axes a legend hides nothing.
# Colours repeat after so many methods, then with another marker.
_COLOURS, _MARKERS = 10, "osD^v"
_LEGEND: Any = {"fontsize": "small", "loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}


def load_pyplot(option: str) -> Any:
    """Return matplotlib's pyplot without a screen. Raises ConfigError, which names the option, where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{option} needs matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a record's texts are no formulas
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, option: str, file: Path, dpi: int = 150) -> None:
    """Write a figure and close it. Raises ConfigError where the file cannot be written, or its suffix is no picture's."""
    try:
        figure.set_layout_engine("constrained")
        # A legend beside the axes is part of the picture.
        figure.savefig(file, dpi=dpi, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {file}: {first_line(error)}") from error
    finally:
        load_pyplot(option).close(figure)


def measures_of(table: Table) -> list[str]:
    """Return the measures that are worth minutes: gaps, perplexities, accuracies; gaps that do not compare stand last."""
    others = [name for name in table.measures if table.kinds[name] in ("perplexity", "accuracy")]
    gaps = sorted((name for name in table.measures if name in table.gaps), key=lambda name: name != GAP)
    return gaps + others if table.one_start() else others + gaps


def points(table: Table, measure: str) -> pd.DataFrame:
    """Return the points of the picture of quality over minutes.

    Returns:
        By row: `run`, `name`, `method`, `minutes` of `run`, the fastest one, `value`, `error`, `memory` in bytes, `front`: no
        other row is as good in as few minutes. Rows without the measure are left out, and those of another run's permutation.
    """
    rows = [row for row in table.means.index if not table.learned_elsewhere(row) and np.isfinite(table.means.at[row, measure])]
    names, several = table.names(), table.labels["pruner"].nunique() > 1
    found = pd.DataFrame({"run": [table.fastest(row) for row in rows], "name": [names[row] for row in rows]}, rows)
    found["method"] = [f"{table.label(row, 'pruner')}, " * several + method_of(table.config(row)) for row in rows]
    found["minutes"] = table.frame["minutes"][found["run"]].to_numpy()
    found["value"] = table.means[measure][rows]
    found["error"] = pd.Series([table.error(row, measure) for row in rows], rows, dtype=float).fillna(0.0)
    found["memory"] = [table.memory(row) for row in rows]
    sign = -1 if table.kinds[measure] in ("accuracy", "share") else 1
    ordered = found.assign(badness=sign * found["value"]).sort_values(["minutes", "badness"])
    found["front"] = ordered["badness"] < ordered["badness"].cummin().shift(fill_value=math.inf)
    return found


def plot_cost(table: Table, file: Path, measure: str | None = None) -> None:
    """Write a picture of quality over minutes: a point a row, peak memory as its area, the Pareto front, the dense model.

    Raises:
        ConfigError: matplotlib is missing, no row has the measure, or the suffix is no format of a picture.
    """
    pyplot = load_pyplot("--to")
    name, valid = measure or table.main(), measures_of(table)
    if not valid:
        raise ConfigError(f"--to {file}: the runs have neither a perplexity nor an accuracy")
    if name not in valid:
        raise ConfigError(f"--measure {name}: valid are {', '.join(valid)}")
    found = points(table, name)
    if found.empty:
        raise ConfigError(f"--to {file}: no row has {name} and minutes of its own")
    front = found[found["front"]].sort_values("minutes")
    figure, axis = pyplot.subplots(figsize=(8, 4.8))
    axis.step(front["minutes"], front["value"], where="post", linestyle=":", color="grey", label="Pareto front")
    sizes = 30 + 150 * found["memory"] / max(1, found["memory"].max())
    for number, (method, some) in enumerate(found.sort_values("minutes").groupby("method", sort=False)):
        marker = _MARKERS[number // _COLOURS % len(_MARKERS)]
        axis.scatter(some["minutes"], some["value"], sizes[some.index], marker=marker, label=method, alpha=0.8)
    if name in table.dense and math.isfinite(table.dense[name][0]):
        axis.axhline(table.dense[name][0], linestyle="--", color="grey", linewidth=1, label="dense")
    axis.margins(x=0.15, y=0.1)
    scales = (found["minutes"].min() > 0, table.kinds[name] == "perplexity")
    axis.set(**{scale: "log" for scale, logarithmic in zip(("xscale", "yscale"), scales, strict=True) if logarithmic})
    for one in (one for one in (axis.xaxis, axis.yaxis) if one.get_scale() == "log"):
        one.set_major_locator(pyplot.LogLocator(subs=(1, 2, 3, 5, 7)))
        one.set_major_formatter("{x:g}")
    axis.minorticks_off()
    if table.kinds[name] == "share":
        axis.yaxis.set_major_formatter("{x:.0%}")
    shared = [{table.label(row, key) for row in found.index} for key in ("model", "sparsity")]
    axis.set_title(", ".join(next(iter(values)) for values in shared if len(values) == 1), fontsize="medium")
    axis.set(xlabel=f"{MINUTES} (area: peak of memory)", ylabel=table.heading(name))
    axis.grid(alpha=0.3)
    axis.legend(**_LEGEND)
    save_figure(figure, "--to", file, 100)


def plot_curves(table: Table, file: Path) -> None:
    """Write a picture of the loss curves of all rows that learned.

    Raises:
        ConfigError: matplotlib is missing, no run has learned, or the suffix is no format of a picture.
    """
    pyplot = load_pyplot("--curves")
    figure, axis = pyplot.subplots(figsize=(7, 4))
    learned = [(name, table.runs[members[0]].history) for name, members in zip(table.names(), table.rows, strict=True)]
    if not any(history for _, history in learned):
        raise ConfigError(f"--curves {file}: no run has a history of losses")
    for name, history in learned:
        losses = [entry.get("loss", math.nan) for entry in history]
        if losses:
            axis.plot(range(1, len(losses) + 1), losses, marker=".", label=name[:48])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="loss, mean of the epoch")
    axis.legend(**_LEGEND)
    save_figure(figure, "--curves", file)


def plot_masks(table: Table, file: Path, linear: str | None = None, size: int = 64) -> None:
    """Write a picture of one linear's mask under every row, its corner in original channel order (PermLLM, figure 3).

    Args:
        table: of runs whose directories hold their masks.
        file: picture; its suffix chooses the format.
        linear: module path, such as `model.layers.0.mlp.down_proj`; None: the first one of the middle layer.
        size: rows and columns of the corner.

    Raises:
        ConfigError: matplotlib is missing, no run has masks, there is no such linear, or the suffix is no format of a picture.
    """
    pyplot = load_pyplot("--masks")
    found = []
    for title, members in zip(table.names(), table.rows, strict=True):
        masks = table.runs[members[0]].directory / MASKS
        if masks.is_file():
            with _opened(masks) as opened:
                layers = by_layer(opened.keys())
            chosen = linear or layers[len(layers) // 2][0]
            if not any(chosen in names for names in layers):
                raise ConfigError(f"--linear {chosen}: {masks} has no such mask; it has {layers[0][0]}, ...")
            found.append((title, chosen, read_mask(masks, chosen)[:size, :size]))
    if not found:
        raise ConfigError(f"--masks: none of the runs has its {MASKS}")
    columns, lines = min(3, len(found)), -(-len(found) // 3)
    figure = pyplot.figure(figsize=(3.4 * columns, 3.8 * lines + 0.3))
    for place, (title, _, mask) in enumerate(found, 1):
        axis = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
        axis.imshow(mask, cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
        axis.set_title(title, fontsize="small")
    rows, channels = found[0][2].shape
    caption = f"{found[0][1]}, rows 0 to {rows - 1}, input channels 0 to {channels - 1}, black: kept"
    figure.suptitle(caption, fontsize="small")
    save_figure(figure, "--masks", file)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file of tensors. Raises DataError, which names the file, where something in it cannot be read."""
    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error


def read_mask(file: Path, name: str) -> NDArray[np.bool_]:
    """Return a mask of `masks.safetensors`, `(C_out, C_in)`, bool."""
    with _opened(file) as opened:
        shape = json.loads(opened.metadata()["shapes"])[name]
        return np.unpackbits(opened.get_tensor(name), count=math.prod(shape)).reshape(shape).astype(bool)


def permutations(directory: Path) -> dict[str, NDArray[np.int64]]:
    """Return the permutations of the first, the middle and the last layer of a run by channel group; empty for none."""
    if not (directory / PERMUTATIONS).is_file():
        return {}
    with _opened(directory / PERMUTATIONS) as opened:
        layers = by_layer(opened.keys())
        chosen = sorted({0, len(layers) // 2, len(layers) - 1})
        return {name: opened.get_tensor(name) for layer in chosen for name in layers[layer]}


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Return names of channel groups or linears by decoder layer, in the order of the layers."""
    layers: dict[int, list[str]] = {}
    for name in sorted(names):
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(int(number[1]) if number else -1, []).append(name)
    return [layers[layer] for layer in sorted(layers)]
