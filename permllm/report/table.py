"""Table of many runs: a row for runs with equal settings, a line for each number of a run.

The long frame `Table.measured` has a line for each run and metric. Two seeds of a row may have:

    run  row  seed  seeds  metric                              kind        value  stderr  dense
    0    1    0     2      wikitext2 perplexity (window 2048)  perplexity  20.0   NaN     10.0
    0    1    0     2      gap closed                          share       0.54   NaN     NaN
    1    1    1     2      wikitext2 perplexity (window 2048)  perplexity  22.0   NaN     10.0
    1    1    1     2      gap closed                          share       0.47   NaN     NaN

`Table.means` and `Table.errors` are made of it, rows by metrics.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from permllm.errors import ConfigError
from permllm.report.gaps import GAP, closed_gaps, row_means, start_rows, texts_of_gaps
from permllm.report.metrics import AVERAGE, FACTS, FP8, OF_SPARSITY, number, setting_text
from permllm.report.read import Run, runs_beside
from permllm.settings.config import NEUTRAL_OPTIONS

# Row of the dense model, before the rows of the runs.
DENSE_ROW = -1
# Parts of the names of redundant settings, such as sizes of a model beside its name, and paths
# beside the digests of their files.
_SPARE = {
    *("path", "data_files", "architecture", "device", "hub_name", "source", "revision"),
    "_target_",
}
# Order of the first columns.
_FIRST = [
    *("method", "model", "sparsity", "pruner", "allocation", "permutation"),
    *("permutation.constraint", "mask", "reconstruction", "reconstruction.start"),
]
# Values that the names of rows leave out.
_USUAL = {**NEUTRAL_OPTIONS, "permutation.constraint": "free", "keep_dense": "none"}


@dataclass(frozen=True)
class Table:
    """Table of runs, with means over seeds and gaps.

    Attributes:
        runs: the runs.
        rows: row of each run.
        labels: texts of each row's settings; empty: the row has no such setting.
        measured: a line for each run and metric, as above, with the `Metric` behind it as
            `detail`; a gap has none.
        starts: for each row with a gap the row from which the gap is measured.
        gaps: for each metric of a gap the perplexities over which it is the mean.
        baseline: row with which others are compared; None: there is none.
    """

    runs: list[Run]
    rows: list[int]
    labels: pd.DataFrame
    measured: pd.DataFrame
    starts: dict[int, int]
    gaps: dict[str, list[str]]
    baseline: int | None

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Return kind, heading and `asked_for` by metric, without zeros that all runs share.

        They are in the order of their columns. A metric with `asked_for` is shown only if named.
        """
        grouped = self.measured.groupby("metric", sort=False)
        metrics = grouped.agg({"kind": "first", "limited": "any", "asked_for": "all"})
        limited = metrics.pop("limited") & (metrics["kind"] != "perplexity")
        metrics["heading"] = metrics.index + limited.map({True: " (limited)", False: ""})
        values = self.measured["value"].round(4).groupby(self.measured["metric"]).nunique()
        metrics = metrics.drop(index=[name for name in OF_SPARSITY if values[name] == 1])
        # Perplexities come first, then gaps.
        metrics["later"] = ~metrics.index.isin(self.gaps) & (metrics["kind"] != "perplexity")
        return metrics.sort_values(["asked_for", "later"], kind="stable")

    @cached_property
    def _numbers(self) -> pd.DataFrame:
        numbers = row_means(self.measured, ["value"])
        grouped = self.measured.groupby(["row", "metric"])
        errors = grouped["value"].std().fillna(grouped["stderr"].first())
        numbers["error"] = errors.where(numbers["value"].notna())
        return pd.concat([numbers, pd.concat({DENSE_ROW: shared_dense(self.measured)})]).unstack()

    @property
    def means(self) -> pd.DataFrame:
        """Return means over the seeds, rows by metrics; NaN: a run of the row lacks the metric.

        The row `DENSE_ROW` has the metrics of the dense model that all runs share; it is absent if
        there are none.
        """
        return self._numbers["value"]

    @property
    def errors(self) -> pd.DataFrame:
        """Return standard deviations over the seeds; of a single run its standard error."""
        return self._numbers["error"]

    @property
    def usual(self) -> list[str]:
        """Return the metrics that are shown if none are named."""
        return [*self.metrics.index[~self.metrics["asked_for"]]]

    def kind(self, name: str) -> str:
        """Return the kind of a metric."""
        return str(self.metrics.at[name, "kind"])

    def heading(self, name: str) -> str:
        """Return the heading of a column, with `(limited)` if some run measured only a part."""
        return str(self.metrics.at[name, "heading"])

    def members(self, row: int) -> list[Run]:
        """Return the runs of a row."""
        return [run for run, of_run in zip(self.runs, self.rows, strict=True) if of_run == row]

    def by_seed(self, row: int, name: str) -> pd.DataFrame:
        """Return the lines of `measured` of one row and metric, with the seeds as index."""
        lines = self.measured[(self.measured["row"] == row) & (self.measured["metric"] == name)]
        return lines.set_index("seed")

    def shown(self, row: int, name: str) -> str:
        """Return the text of a metric's mean and error; empty: the row lacks the metric."""
        mean = self.means.at[row, name]
        error = self.errors.at[row, name]
        return "" if math.isnan(mean) else number(mean, self.kind(name), error)


def table_of(runs: list[Run], baseline: str | None = None) -> Table:
    """Return the table of runs. Gaps of the baseline's model are measured from the baseline.

    Args:
        runs: the runs.
        baseline: settings of one row, as in `find`; None: there is no baseline.
    """
    keys = [run.key("seed") for run in runs]
    labels = _labels(runs, keys)
    rows = [*labels.index.get_indexer(keys)]
    labels = labels.reset_index(drop=True)
    start = find(labels, baseline, "--baseline") if baseline else None
    unpermuted = {row for run, row in zip(runs, rows, strict=True) if run.methods == "none"}
    starts = start_rows(labels, unpermuted, start)

    measured = _measured(runs, rows)
    closed = closed_gaps(measured, starts)
    gaps = texts_of_gaps(closed)
    of_runs = measured[["run", "row", "model", "seed", "seeds"]].drop_duplicates("run")
    for gap, texts in gaps.items():
        shares = closed[texts].mean(axis=1, skipna=False).rename("value")
        lines = of_runs.join(shares, on="run", how="inner")
        lines = lines.assign(metric=gap, kind="share", limited=False, asked_for=False)
        measured = pd.concat([measured, lines], ignore_index=True)
    return Table(runs, rows, labels, measured, starts, gaps, start)


def _labels(runs: list[Run], keys: list[str]) -> pd.DataFrame:
    """Return the texts of the settings of each row by the key of its runs, in the order of rows."""
    labels = pd.DataFrame(
        {name: setting_text(value) for name, value in run.settings().items()} for run in runs
    )
    # A row has the name of those of its runs that have one.
    labels["method"] = labels["method"].replace("", None)
    labels = labels.groupby(keys, sort=False).first().fillna("")
    return labels.sort_values(varying(labels), key=lambda texts: texts.map(_sort_key))


def _measured(runs: list[Run], rows: list[int]) -> pd.DataFrame:
    """Return a line for each metric of each run.

    `metric` is its name, and the facts in which metrics of equal name differ.
    """
    lines = pd.DataFrame(
        {"run": place, "row": row, "seed": run.config["seed"], "model": run.config["model"]["name"]}
        | vars(metric)
        | metric.facts
        | {"detail": metric}
        for place, (run, row) in enumerate(zip(runs, rows, strict=True))
        for metric in run.results
    )
    facts = lines.reindex(columns=FACTS)
    facts = facts.where(facts.groupby([lines["name"], lines["tokenizer"]]).transform("nunique") > 1)
    names = lines["name"].items()
    dense = [*lines["dense"]]
    return lines.assign(
        metric=[", ".join([name, *facts.loc[line].dropna()]) for line, name in names],
        seeds=lines.groupby("row")["run"].transform("nunique"),
        stderr=lines["stderr"].astype(float),
        dense=[metric.value if metric else math.nan for metric in dense],
        dense_stderr=[metric.stderr if metric else None for metric in dense],
    )


def shared_dense(measured: pd.DataFrame) -> pd.DataFrame:
    """Return `value` and `error` of the dense model by metric, if all runs have the same ones."""
    grouped = measured.dropna(subset="dense").groupby("metric")
    dense = grouped.agg(value=("dense", "first"), error=("dense_stderr", "first"))
    values = grouped["dense"]
    # Machines differ in the order of sums.
    shared = np.isclose(values.min(), values.max(), rtol=1e-4, atol=0)
    # A run of the only model may lack the metric, because it calibrates on the text.
    if measured["model"].nunique() > 1:
        shared &= values.size() == measured["run"].nunique()
    return dense[shared]


def by_run(table: Table) -> pd.DataFrame:
    """Return a line for each run: settings, metrics with the dense model's, minutes, directory."""
    frame = pd.DataFrame(
        {name: value for name, value in run.settings().items() if not _is_spare(name)}
        | {"seed": run.config["seed"], "minutes": run.minutes, "directory": str(run.directory)}
        for run in table.runs
    )
    values = table.measured.pivot(index="run", columns="metric", values=["value", "dense"])
    dense = values["dense"].dropna(axis=1, how="all").add_prefix("dense: ")
    return frame.assign(row=table.rows).join([values["value"], dense])


def gap_of(directory: Path) -> dict[str, float]:
    """Return `gap_closed` of a finished run; empty: no run beside it is the start of its gap."""
    runs = by_run(table_of(runs_beside(directory))).set_index("directory")
    gaps = runs.get(GAP, pd.Series()).dropna()
    name = str(directory)
    return {"gap_closed": gaps[name]} if name in gaps else {}


def choose(table: Table, parts: str | None = None) -> list[str]:
    """Return the metrics to show.

    Args:
        table: table of the runs.
        parts: names, or parts of the names of several, separated by ", "; None: the usual ones.

    Raises:
        ConfigError: no metric fits.
    """
    if not parts:
        return table.usual
    wanted: set[str] = set()
    for part in parts.split(", "):
        fitting = {name for name in table.metrics.index if part in name}
        usual = fitting & {*table.usual}
        wanted |= {part} if part in fitting else usual or fitting
    if not wanted:
        valid = ", ".join(table.metrics.index)
        raise ConfigError(f"--metrics {parts}: expected names, or parts, of {valid}")
    return [name for name in table.metrics.index if name in wanted]


def main_metric(table: Table, names: list[str]) -> str | None:
    """Return the metric by which rows are compared, one of some names; None: there is none.

    The first of these that most rows have: mean gap over several texts, if all gaps of a model
    have one start; perplexity; average accuracy; other accuracy.
    """
    candidates = []
    several_texts = GAP in names and len(table.gaps[GAP]) > 1
    starts = [*{*table.starts.values()}]
    if several_texts and table.labels["model"][starts].is_unique:
        candidates.append(GAP)
    candidates += [name for name in names if table.kind(name) == "perplexity"]
    accuracies = [name for name in names if table.kind(name) == "accuracy"]
    candidates += sorted(accuracies, key=lambda name: not name.startswith(AVERAGE))
    counts = table.means.loc[table.labels.index].count()
    return max(candidates, key=counts.get, default=None)


def notes(table: Table, names: list[str], columns: str | None = None) -> list[str]:
    """Return lines for the reader of some metrics, about gaps and about the dense model."""
    shown = [gap for gap in table.gaps if gap in names]
    lines = [
        f"{gap}: the mean over {', '.join(table.gaps[gap])}"
        for gap in shown
        if gap in (GAP, GAP + FP8) and len(table.gaps) > 1
    ]
    if shown and table.baseline is None:
        of_rows = row_names(table.labels, columns)
        bases = ", ".join(f"'{of_rows[row]}'" for row in sorted({*table.starts.values()}))
        lines.append(
            f"{GAP}: 0 % is {bases} (Wanda's unpermuted row, or else that of the same pruner)"
        )
    if DENSE_ROW not in table.means.index and table.measured["model"].nunique() == 1:
        lines.append("no row of the dense model: the runs have different ones, or none")
    return lines


def naming(labels: pd.DataFrame, columns: str | None = None) -> list[str]:
    """Return the settings that name rows, which are shown before the metrics.

    These are `columns`, separated by commas, or else the options that vary, and those that tell
    equal rows apart. Raises ConfigError if a setting does not exist.
    """
    varied = varying(labels)
    wanted = columns.split(",") if columns else {*varied} & {*_FIRST}
    if unknown := [name for name in wanted if name not in labels]:
        raise ConfigError(f"--columns {unknown[0]}: expected settings, such as {', '.join(varied)}")
    names = _ranked(wanted)
    for name in varied:
        if name not in names and (not names or _differs(labels, name, names)):
            names.append(name)
    return names


def details(labels: pd.DataFrame, columns: str | None = None) -> list[str]:
    """Return the settings shown after the metrics; none if the columns are chosen.

    Settings that an option implies are not shown.
    """
    if columns:
        return []
    names = naming(labels)
    others = [name for name in varying(labels) if name not in names]
    return [name for name in others if not _is_implied(labels, name)]


def row_names(labels: pd.DataFrame, columns: str | None = None) -> pd.Series:
    """Return a short name for each row, without options that do nothing."""
    names = []
    for _, texts in labels[naming(labels, columns)].iterrows():
        parts = [
            value if name in _FIRST else f"{name.rpartition('.')[2]}={value}"
            for name, value in texts.items()
            if value not in ("", _USUAL.get(name))
        ]
        names.append(", ".join(parts or filter(None, texts)))
    return pd.Series(names, labels.index)


def varying(labels: pd.DataFrame) -> list[str]:
    """Return the settings in which rows differ; all of them if two rows would look the same."""
    settings = labels.drop(columns="method")
    present = settings[[name for name in settings if not _is_spare(name)]].replace("", None)
    names = present.columns[present.nunique() > 1]
    if len(names) == 0 or labels[names].duplicated().any():
        names = settings.columns[settings.nunique() > 1]
    return _ranked(names) or ["pruner", "permutation"]


def _differs(labels: pd.DataFrame, name: str, others: list[str]) -> bool:
    """Tell if rows differ in a setting although they agree in some others."""
    return bool((labels.groupby(others)[name].nunique() > 1).any())


def _is_implied(labels: pd.DataFrame, name: str) -> bool:
    """Tell if an option has one value of a setting of its own in all rows."""
    option, _, part = name.partition(".")
    return bool(part) and option in labels and not _differs(labels, name, [option])


def find(labels: pd.DataFrame, text: str, option: str) -> int:
    """Return the only row with the settings `name=value,name=value` of an option.

    The name of a method finds its rows with other values too.
    """
    rows = labels.assign(method=labels["method"].str.partition(", ")[0])
    # A value may be a list, so that only a comma before a name separates settings. Of some settings
    # the digest is shown.
    for part in re.split(r",(?=[\w.-]+(?: \(digest\))?=)", text):
        name, _, value = part.partition("=")
        present = rows.get(name, pd.Series()).unique()
        if value not in present:
            valid = ", ".join(present) or f"settings of {', '.join(varying(labels))}"
            raise ConfigError(f"{option} {text}: no row has {part}; valid are {valid}")
        rows = rows[rows[name] == value]
    if len(rows) > 1:
        differing = ", ".join(varying(rows))
        raise ConfigError(f"{option} {text}: {len(rows)} rows fit; they differ in {differing}")
    return int(rows.index[0])


def _ranked(names: Collection[str]) -> list[str]:
    others = sorted({*names} - {*_FIRST})
    return [name for name in _FIRST if name in names] + others


def _is_spare(name: str) -> bool:
    return not _SPARE.isdisjoint(name.split("."))


def _sort_key(text: str) -> tuple[int, float, str]:
    """Return the sort key of a setting's text: `none` first, then numbers, then words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (-1, 0.0, "") if text == "none" else (1, 0.0, text)
