"""Labels beside the points of a picture, in free places."""

from collections.abc import Iterable
from typing import Any

import numpy as np

# Distances of a label from its point in points of 1/72 inch, the nearest first, and directions.
_DISTANCES = (7, 14, 24, 36, 50, 66, 84, 104, 126, 150)
_ANGLES = np.linspace(0, 2 * np.pi, 16, endpoint=False)
_DIRECTIONS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def place_labels(axis: Any, labels: Iterable[str], points: Any) -> None:
    """Write a label beside each point of an axis, where it hides no point and no other text.

    A thin line leads from a label to its point.

    Args:
        axis: axis of matplotlib, which has its final size and limits.
        labels: text of each point.
        points: `(points, 2)`, in the units of the axis.
    """
    from matplotlib.transforms import Bbox

    axis.figure.draw_without_rendering()  # makes the layout
    unit = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    places = axis.transData.transform(points)
    boxes = [Bbox([place - 5 * unit, place + 5 * unit]) for place in places]
    boxes += [text.get_window_extent() for text in axis.texts]
    for label, point in zip(labels, points, strict=True):
        text = axis.annotate(
            label,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize="small",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 0},
        )
        text.set_in_layout(False)  # a long label must not make the axis small
        extent = text.get_window_extent()
        offsets = [
            direction * (distance * unit + extent.size / 2)
            for distance in _DISTANCES
            for direction in _DIRECTIONS
        ]
        crowds = []
        for offset in offsets:
            box = extent.translated(*offset)
            outside = (Bbox.union([frame, box]).extents != frame.extents).any()
            crowds.append(box.count_overlaps(boxes) + 10 * outside)
        best = offsets[int(np.argmin(crowds))]
        text.set_position(best / unit)
        boxes.append(extent.translated(*best))
