"""Readers of what runs have left: `frame(DIR, ...)` is their numbers as a pandas DataFrame."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frame"]

log = logging.getLogger(__name__)


def frame(*places: str | Path) -> pd.DataFrame:
    """Return the finished runs below some folders, or in some files of records, one row each.

    Columns: each setting that some run has, by its name on the command line; `seed`; `method`,
    where one was typed; each measure of the sparse model by the name that tables have, and of the
    dense model after `dense: ` (accuracies as shares); `minutes` of calibration, permutation, masks
    and pruning; `directory`.

    Raises:
        ConfigError: there is no such place, or no finished run. What else is no such run is a
            warning.
    """
    from permllm.runs.read import collect
    from permllm.runs.table import frame_of, measures_of

    found = collect(map(Path, places))
    for note in found.notes:
        log.warning("%s", note)
    return frame_of(found.runs, measures_of(found.runs))
