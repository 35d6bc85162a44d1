"""Share of the gap between unpermuted and dense model that runs close."""

from typing import Any

import numpy as np
import pandas as pd

from permllm.report.metrics import FP8, PERPLEXITY
from permllm.settings.config import METHOD_GROUPS

GAP = "gap closed"
# Settings that belong to a method, without the pruner's. The row from which a gap is measured may
# have other values.
_OF_METHODS = {"method", *METHOD_GROUPS[1:], "temperature", "block_size"}
# Names of the settings that distinguish two models.
_OF_MODEL = r"^model($|\.(hub_name|revision|architecture|path \(digest\)))"


def start_rows(labels: pd.DataFrame, unpermuted: set[int], baseline: int | None) -> dict[int, int]:
    """Return the row from which each row's gap is measured; some rows have none.

    It is the baseline for all rows of its model. Without a baseline it is Wanda's unpermuted row
    with the same other settings; without such a row the unpermuted row of the same pruner.

    Args:
        labels: texts of the settings of each row.
        unpermuted: rows whose allocation, permutation, mask and reconstruction do nothing.
        baseline: row that the user has named; None: there is none.
    """
    if baseline is not None:
        models = labels.filter(regex=_OF_MODEL)
        same = (models == models.loc[baseline]).all(axis=1)
        return dict.fromkeys(labels.index[same], baseline)
    of_wanda = unpermuted & {*labels.index[labels["pruner"] == "wanda"]}
    starts: dict[int, int] = {}
    # Wanda's rows come last, and replace those of other pruners.
    for methods, bases in ((_OF_METHODS, unpermuted), (_OF_METHODS | {"pruner"}, of_wanda)):
        others = [name for name in labels if not {name, name.split(".")[0]} & methods]
        for rows in labels.groupby(others).groups.values():
            for base in bases.intersection(rows):
                starts |= dict.fromkeys(rows, base)
    return starts


def closed_gaps(measured: pd.DataFrame, starts: dict[int, int]) -> pd.DataFrame:
    """Return the gap closed of each run, a column for each perplexity that has a gap.

    Start and dense model have one number for each text, the mean of the logarithm over all seeds of
    the start's row, so that each run is measured from the same number, whatever its seed.

    Args:
        measured: long frame of a table.
        starts: row from which each row's gap is measured (`start_rows`).
    """
    lines = measured[measured["kind"] == "perplexity"]
    lines = lines.assign(value=np.log(lines["value"]), dense=np.log(lines["dense"]))
    lines["start"] = lines["row"].map(starts).astype(float)
    bases = row_means(lines, ["value", "dense"])
    lines = lines.join(bases, on=["start", "metric"], rsuffix=" of start")
    lines["closed"] = gap_closed(lines["value"], lines["value of start"], lines["dense of start"])
    closed = lines.pivot(index="run", columns="metric", values="closed")
    return closed[lines["metric"].unique()].dropna(axis=1, how="all")


def gap_closed(values: Any, start: Any, dense: Any) -> Any:
    """Return the gap closed, `(start - values) / (start - dense)`, of log-perplexities.

    The gap is NaN if a perplexity is not finite, or if the start is as good as the dense model.
    """
    whole = start - dense
    closed = (start - values) / whole.where(whole > 0)
    return closed.where(np.isfinite(closed))


def row_means(measured: pd.DataFrame, numbers: list[str]) -> pd.DataFrame:
    """Return means over the runs of each row and metric; NaN: a run of the row lacks the number."""
    grouped = measured.groupby(["row", "metric"])
    complete = grouped[numbers].count().eq(grouped["seeds"].first(), axis=0)
    return grouped[numbers].mean().where(complete)


def texts_of_gaps(closed: pd.DataFrame) -> dict[str, list[str]]:
    """Return for each metric of a gap the perplexities over which it is the mean.

    These are the gap over the texts that all rows with a gap have, and if there are several texts,
    the gap in each of them.
    """
    common = closed.columns[closed.dropna(how="all").notna().all()]
    gaps = {}
    for ending in ("", FP8):
        names = [name for name in common if (FP8 in name) == bool(ending)]
        if names:
            gaps[GAP + ending] = names
    if len(closed.columns) > 1:
        gaps |= {name.replace(PERPLEXITY, f" {GAP} (", 1): [name] for name in closed}
    return gaps
