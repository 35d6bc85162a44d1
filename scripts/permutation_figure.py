"""Figures of docs/method.md and README: a permutation at 2:4, and how logits become one.

Run `python scripts/permutation_figure.py docs/permutation.png docs/idea.png`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.permutation.heuristic import heuristic_permutation
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.sinkhorn import normalize
from permllm.report.plots import picture
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import nm_mask, permuted_nm_mask, saliency_sum

_PATTERN = NMPattern(2, 4)
# The first four channels are large in most rows, as channels with large inputs are under Wanda.
_SALIENCY = [
    [9, 7, 8, 6, 2, 1, 4, 3],
    [6, 9, 5, 2, 1, 3, 2, 8],
    [8, 3, 9, 7, 6, 2, 1, 1],
    [7, 8, 1, 9, 1, 5, 3, 2],
]
_ITERATIONS = 5
_COLORS = ("#9ecae1", "#fdbe85")  # of the two groups in the original order
_PRUNED = "#f2f2f2"


def _matrix(axes: Any, title: str, saliency: Tensor, mask: Tensor, channels: Tensor) -> None:
    """Draw a saliency `(rows, channels)`; `channels` are the original numbers of its columns."""
    rows, columns = saliency.shape
    for row in range(rows):
        for column in range(columns):
            kept = bool(mask[row, column])
            color = _COLORS[int(channels[column]) // _PATTERN.m] if kept else _PRUNED
            cell = {"facecolor": color, "edgecolor": "white"}
            axes.add_patch(_rectangle(column, row, 1, 1, **cell))
            style = {"weight": "bold"} if kept else {"color": "#999999"}
            value = f"{saliency[row, column]:.0f}"
            axes.text(column + 0.5, row + 0.5, value, ha="center", va="center", **style)
    for start in range(0, columns, _PATTERN.m):
        frame = {"fill": False, "edgecolor": "black", "linewidth": 1.5}
        axes.add_patch(_rectangle(start, 0, _PATTERN.m, rows, **frame))
    share = saliency_sum(saliency, mask) / saliency_sum(saliency)
    axes.set_title(f"{title}\n{share:.0%} of the saliency is kept", fontsize=10)
    axes.set_xticks([column + 0.5 for column in range(columns)], channels.tolist())
    axes.set_yticks([row + 0.5 for row in range(rows)], range(rows))
    axes.set(xlim=(-0.1, columns + 0.1), ylim=(rows + 0.1, -0.1), aspect="equal")
    axes.set_xlabel("input channel", fontsize=9)
    axes.tick_params(length=0, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _rectangle(left: float, top: float, width: float, height: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), width, height, **style)


def _around_zero(values: Tensor) -> Any:
    from matplotlib.colors import CenteredNorm

    return CenteredNorm(halfrange=float(values.abs().max()))


def _square(axes: Any, title: str, values: Tensor) -> None:
    """Draw a block `(B, B)`: its rows are channels, its columns positions."""
    if float(values.min()) < 0:
        axes.imshow(values, cmap="RdBu", norm=_around_zero(values))
    else:
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("position", fontsize=9)
    axes.set_xticks(range(len(values)))
    axes.set_yticks(range(len(values)))
    axes.tick_params(length=0, labelsize=8)


def draw_idea(file: Path) -> None:
    """Write the upper row of the figure to a file."""
    with picture(file) as pyplot:
        _draw_permutation(pyplot.figure(figsize=(10.5, 2.7)))


def _draw_permutation(figure: Any) -> Tensor:
    """Draw the masks before and after a permutation, and return it."""
    saliency = torch.tensor(_SALIENCY, dtype=torch.float32)
    channels = torch.arange(saliency.shape[1])
    perm = heuristic_permutation(lambda: [saliency], _PATTERN)
    first, second, third = figure.subplots(1, 3)
    _matrix(first, "original order, 2:4", saliency, nm_mask(saliency, _PATTERN), channels)
    permuted = saliency[:, perm]
    _matrix(second, "permuted, 2:4", permuted, nm_mask(permuted, _PATTERN), perm)
    back = permuted_nm_mask(saliency, perm, _PATTERN)
    _matrix(third, "the same mask, original order: not 2:4", saliency, back, channels)
    first.set_ylabel("row of W", fontsize=9)
    return perm


def draw(file: Path) -> None:
    """Write the whole figure to a file."""
    with picture(file) as pyplot:
        above, below = pyplot.figure(figsize=(10.5, 5.6)).subfigures(2, 1)
        perm = _draw_permutation(above)
        _draw_logits(below, perm)


def _draw_logits(figure: Any, perm: Tensor) -> None:
    """Draw how logits become a permutation."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(len(perm))[:, perm]
    noise = torch.randn(matrix.shape, generator=generator)
    # Near enough to the permutation above that the assignment finds it.
    logits = (0.4 * matrix + 0.12 * noise).unsqueeze(0)
    soft = {tau: normalize(logits, tau, 2 * _ITERATIONS)[0] for tau in (1.0, 0.1)}
    (hard,) = harden([soft[0.1]])

    blocks = [("logits A", logits), ("soft, temperature 1", soft[1.0])]
    blocks += [("soft, temperature 0.1", soft[0.1])]
    blocks += [("hard, by assignment", torch.eye(len(perm))[:, hard[0]].unsqueeze(0))]
    for axes, (title, block) in zip(figure.subplots(1, 4), blocks, strict=True):
        _square(axes, title, block[0])
    figure.axes[0].set_ylabel("channel of the block", fontsize=9)


def main(arguments: Sequence[str]) -> int:
    """Draw to the files that the arguments name."""
    if len(arguments) != 2:
        print("usage: python scripts/permutation_figure.py WHOLE.png IDEA.png", file=sys.stderr)
        return 2
    draw(Path(arguments[0]))
    draw_idea(Path(arguments[1]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
