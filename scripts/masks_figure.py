"""Draw the corner of one linear's mask for each row of runs, as in figure 3 of the paper.

    python scripts/masks_figure.py runs/sweeps/figure3-* --to masks.png

A run directory has its masks, and a record has not. The linear is one of the middle layer.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.command import run_tool
from permllm.errors import ConfigError
from permllm.report.plots import picture
from permllm.report.read import Run, collect
from permllm.report.table import Table, row_names, table_of
from permllm.settings.config import NMPattern
from permllm.store.files import MASKS
from permllm.store.tensors import load_masks

_CORNER = 64  # rows and channels that are drawn


def draw(table: Table, file: Path) -> None:
    """Draw a panel for each row of a table, with the title of its row and linear."""
    runs = {
        name: run
        for row, name in row_names(table.labels).items()
        if ((run := table.members(row)[0]).directory / MASKS).is_file()
    }
    if not runs:
        raise ConfigError(f"{file}: none of the runs has its {MASKS}")
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / 3)
    with picture(file) as pyplot:
        figure = pyplot.figure(figsize=(3.4 * columns, 4.1 * lines + 0.3))
        for place, (name, run) in enumerate(runs.items(), 1):
            axis = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
            _panel(axis, name, run)
        figure.suptitle("black: kept; lines: every M channels", fontsize="small")


def _panel(axis: Any, name: str, run: Run) -> None:
    """Draw the corner of a run's mask, in the dense model's order of channels."""
    masks = load_masks(run.directory / MASKS)
    paths = sorted(masks, key=lambda name: int(re.findall(r"\.(\d+)\.", name)[0]))
    path = paths[len(paths) // 2]
    corner = masks[path].numpy()[:_CORNER, :_CORNER]
    axis.imshow(corner, cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
    width = NMPattern.parse(run.config["sparsity"]).m
    for channel in range(width, corner.shape[1], width):
        axis.axvline(channel - 0.5, color="C1", linewidth=0.5)
    rows, channels = corner.shape
    title = f"{name}, seed {run.config['seed']}: {path}, {rows} rows, {channels} channels"
    axis.set_title(fill(title, 40), fontsize="small")


def main(words: list[str]) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(words)
    draw(table_of(collect(options.runs).runs), options.to)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
