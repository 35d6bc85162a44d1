"""Table of many runs: a row for runs with equal settings, a column for each varying setting."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from permllm.errors import ConfigError
from permllm.report.gaps import (
    GAP,
    closed_gaps,
    row_means,
    start_rows,
    texts_of_gaps,
)
from permllm.report.measures import (
    AVERAGE,
    DENSE,
    FACTS,
    FP8,
    OF_SPARSITY,
    Measure,
    number,
    setting_text,
)
from permllm.report.read import Run
from permllm.settings.config import IDLE

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
_USUAL = {**IDLE, "permutation.constraint": "free", "keep_dense": "none"}


@dataclass
class Table:
    """Table of runs, with means over seeds and gaps.

    Attributes:
        runs: the runs.
        values: measures of each run, by column. Those of the dense model begin with `dense: `.
        frame: a line for each run (`runs_frame`), with the index of its `row` and its gaps.
        labels: texts of each row's settings; empty: the row has no such setting.
        kinds: kind of each measure.
        means: means over the seeds, rows by measures; NaN: a run of the row lacks the measure. The
            row `DENSE_ROW` has the measures of the dense model that all runs share; it is absent
            if there are none.
        errors: standard deviations over the seeds, as `means`; of a single run its standard error.
        starts: for each row with a gap the row from which the gap is measured.
        gaps: for each measure of a gap the perplexities over which it is the mean.
        baseline: row with which others are compared; None: there is none.
        varied: settings in which rows differ, or those that `show` has chosen.
        settings: those of them that name the rows. They are shown before the measures.
        measures: columns of measures that are shown.
    """

    runs: list[Run]
    values: list[dict[str, Measure]]
    frame: pd.DataFrame
    labels: pd.DataFrame
    kinds: dict[str, str]
    means: pd.DataFrame
    errors: pd.DataFrame
    starts: dict[int, int]
    gaps: dict[str, list[str]]
    baseline: int | None
    varied: list[str]
    settings: list[str]
    measures: list[str]

    @property
    def notes(self) -> list[str]:
        """Lines for the reader about the gaps that are shown, and about the dense model."""
        shown = [gap for gap in self.gaps if gap in self.measures]
        notes = [
            f"{gap}: the mean over {', '.join(self.gaps[gap])}"
            for gap in shown
            if gap in (GAP, GAP + FP8) and len(self.gaps) > 1
        ]
        if shown and self.baseline is None:
            names = self.names()
            bases = ", ".join(f"'{names[row]}'" for row in sorted({*self.starts.values()}))
            notes.append(
                f"{GAP}: 0 % is {bases} (Wanda's unpermuted row, or else that of the same pruner)"
            )
        if DENSE_ROW not in self.means.index and self.frame["model"].nunique() == 1:
            notes.append("no row of the dense model: the runs have different ones, or none")
        return notes

    def members(self, row: int) -> pd.DataFrame:
        """Return the lines of a row's runs in `frame`."""
        return self.frame[self.frame["row"] == row]

    def first(self, row: int) -> Run:
        """Return the first run of a row."""
        return self.runs[self.members(row).index[0]]

    def has(self, row: int, name: str) -> bool:
        """Tell if all runs of a row have a measure."""
        return not math.isnan(self.means.at[row, name])

    def shown(self, row: int, name: str) -> str:
        """Return the text of a measure's mean and error; empty: the row lacks the measure."""
        if not self.has(row, name):
            return ""
        return number(self.means.at[row, name], self.kinds[name], self.errors.at[row, name])

    def heading(self, name: str) -> str:
        """Return the heading of a column, with `(limited)` if some run measured only a part."""
        measures = [run[name] for run in self.values if name in run]
        limited = any(measure.limited and measure.kind != "perplexity" for measure in measures)
        return f"{name} (limited)" if limited else name

    def show(self, columns: str | None, measures: str | None) -> None:
        """Choose the columns to show; None: the usual columns.

        Args:
            columns: settings, separated by commas.
            measures: measures, or parts of the names of several, separated by ", ".

        Raises:
            ConfigError: a setting does not exist, or no measure fits.
        """
        if columns:
            names = columns.split(",")
            if unknown := [name for name in names if name not in self.labels]:
                valid = ", ".join(varying(self.labels))
                raise ConfigError(f"--columns {unknown[0]}: expected settings, such as {valid}")
            self.settings = _ranked(names)
            self.settings = telling_apart(self.labels, self.settings, self.varied)
            self.varied = self.settings
        if measures:
            wanted: set[str] = set()
            for part in measures.split(", "):
                usual = {name for name in self.measures if part in name}
                others = {name for name in self.kinds if part in name}
                wanted |= {part} if part in others else usual or others
            every = dict.fromkeys([*self.measures, *self.kinds])
            self.measures = [name for name in every if name in wanted]
        if not self.measures:
            valid = ", ".join(self.kinds)
            raise ConfigError(f"--measures {measures}: expected names, or parts, of {valid}")

    def main(self) -> str | None:
        """Return the measure by which rows are compared; None: there is none.

        The first of these that most rows have: mean gap over several texts, if all gaps of a model
        have one start; perplexity; average accuracy; other accuracy.
        """
        candidates = []
        several_texts = GAP in self.measures and len(self.gaps[GAP]) > 1
        starts = [*{*self.starts.values()}]
        if several_texts and self.labels["model"][starts].is_unique:
            candidates.append(GAP)
        for kind in ("perplexity", "accuracy"):
            names = [name for name in self.measures if self.kinds[name] == kind]
            candidates += sorted(names, key=lambda name: not name.startswith(AVERAGE))
        counts = self.means.loc[self.labels.index].count()
        return max(candidates, key=counts.get, default=None)

    def details(self) -> list[str]:
        """Return the settings shown after the measures, without those that an option implies."""
        details = []
        for name in self.varied:
            option, _, part = name.partition(".")
            implied = part and option in self.labels and not _differs(self.labels, name, [option])
            if not implied and name not in self.settings:
                details.append(name)
        return details

    def names(self) -> list[str]:
        """Return a short name for each row, without options that do nothing."""
        names = []
        for _, texts in self.labels[self.settings].iterrows():
            parts = [
                value if name in _FIRST else f"{name.rpartition('.')[2]}={value}"
                for name, value in texts.items()
                if value not in ("", _USUAL.get(name))
            ]
            names.append(", ".join(parts or filter(None, texts)))
        return names


def table_of(runs: list[Run], baseline: str | None = None) -> Table:
    """Return the table of runs. Gaps of the baseline's model are measured from the baseline.

    Args:
        runs: the runs.
        baseline: settings of one row, as in `find`; None: there is no baseline.
    """
    values = named_measures(runs)
    frame = runs_frame(runs, values)
    keys = [run.key("seed") for run in runs]
    labels = runs_labels(runs).set_axis(keys)
    # A row has the name of those of its runs that have one.
    names = labels["method"].replace("", None)
    labels["method"] = names.groupby(level=0).transform("first").fillna("")
    labels = labels[~labels.index.duplicated()]
    varied = varying(labels)
    labels = labels.sort_values(varied, key=lambda texts: texts.map(_sort_key))
    frame["row"] = labels.index.get_indexer(keys)
    labels = labels.reset_index(drop=True)
    start = find(labels, baseline, "--baseline") if baseline else None
    unpermuted = [run.methods == "none" for run in runs]
    starts = start_rows(labels, {*frame["row"][unpermuted]}, start)

    measures = {
        name: measure
        for run in values
        for name, measure in run.items()
        if not name.startswith(DENSE)
    }
    kinds = {name: measure.kind for name, measure in measures.items()}
    shown = [name for name, measure in measures.items() if not measure.asked_for]
    closed = closed_gaps(frame, starts, [name for name in shown if kinds[name] == "perplexity"])
    gaps = texts_of_gaps(closed)
    for gap, names in gaps.items():
        frame[gap] = closed[names].mean(axis=1, skipna=False)
        kinds[gap] = "share"
    if gaps:
        end = shown.index(closed.columns[-1]) + 1
        shown[end:end] = gaps
    for name in OF_SPARSITY:
        if frame[name].round(4).nunique() == 1:
            shown.remove(name)
            del kinds[name]
    means, errors = means_and_errors(frame, values, [*kinds])
    return Table(
        runs=runs,
        values=values,
        frame=frame,
        labels=labels,
        kinds=kinds,
        means=means,
        errors=errors,
        starts=starts,
        gaps=gaps,
        baseline=start,
        varied=varied,
        settings=telling_apart(labels, [name for name in varied if name in _FIRST], varied),
        measures=shown,
    )


def means_and_errors(
    frame: pd.DataFrame, values: list[dict[str, Measure]], names: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `means` and `errors` of a table."""
    rows = frame["row"]
    stderrs = pd.DataFrame(
        {name: measure.stderr for name, measure in run.items()} for run in values
    ).astype(float)
    means = row_means(frame[names], rows)
    errors = frame[names].groupby(rows).std().fillna(stderrs.groupby(rows).first())
    errors = errors.where(means.notna())
    for name in names:
        dense = f"{DENSE}{name}"
        if dense not in frame:
            continue
        # A run of the only model may lack the measure, because it calibrates on the text.
        of_runs = frame[dense].dropna() if frame["model"].nunique() == 1 else frame[dense]
        shared = shared_value(of_runs)
        if shared is not None:
            means.at[DENSE_ROW, name] = shared
            errors.at[DENSE_ROW, name] = stderrs.at[of_runs.index[0], dense]
    return means, errors


def shared_value(values: pd.Series) -> float | None:
    """Return the value of the dense model that runs share; None: they differ, or some lack it."""
    first = float(values.iloc[0])
    # Machines differ in the order of sums.
    return first if np.isclose(values, first, rtol=1e-4, atol=0).all() else None


def named_measures(runs: list[Run]) -> list[dict[str, Measure]]:
    """Return each run's measures by column.

    A column has the name of the measure, and the facts in which measures of equal name differ.
    """
    measures = pd.DataFrame(
        {"run": place, "measure": measure, "name": measure.name, "model": measure.model}
        | measure.facts
        for place, run in enumerate(runs)
        for measure in run.measures
    )
    facts = measures.reindex(columns=FACTS)
    groups = [measures["name"], measures["model"]]
    facts = facts.where(facts.groupby(groups).transform("nunique") > 1)
    measures["column"] = [
        ", ".join([name, *facts.loc[place].dropna()]) for place, name in measures["name"].items()
    ]
    return [
        dict(zip(of_run["column"], of_run["measure"], strict=True))
        for _, of_run in measures.groupby("run")
    ]


def runs_frame(runs: list[Run], values: list[dict[str, Measure]]) -> pd.DataFrame:
    """Return a line for each run: settings, seed, measures, minutes, directory and threads."""
    return pd.DataFrame(
        {name: value for name, value in run.settings().items() if not _is_spare(name)}
        | {"seed": run.config["seed"]}
        | {name: measure.value for name, measure in measures.items()}
        | {"minutes": run.minutes, "directory": str(run.directory)}
        | {"threads": str(run.environment.get("hardware", {}).get("threads", ""))}
        for run, measures in zip(runs, values, strict=True)
    )


def runs_labels(runs: list[Run]) -> pd.DataFrame:
    """Return the texts of each run's settings but the seed; empty: the run has no such setting."""
    return pd.DataFrame(
        {name: setting_text(value) for name, value in run.settings().items()} for run in runs
    ).fillna("")


def varying(labels: pd.DataFrame) -> list[str]:
    """Return the settings in which rows differ; all of them if two rows would look the same."""
    settings = labels.drop(columns="method")
    present = settings[[name for name in settings if not _is_spare(name)]].replace("", None)
    names = present.columns[present.nunique() > 1]
    if len(names) == 0 or labels[names].duplicated().any():
        names = settings.columns[settings.nunique() > 1]
    return _ranked(names) or ["pruner", "permutation"]


def telling_apart(labels: pd.DataFrame, names: list[str], others: list[str]) -> list[str]:
    """Return names of settings, and those other settings that tell equal rows apart."""
    columns = [*names]
    for name in others:
        if name not in columns and (not columns or _differs(labels, name, columns)):
            columns.append(name)
    return columns


def _differs(labels: pd.DataFrame, name: str, others: list[str]) -> bool:
    """Tell if rows differ in a setting although they agree in some others."""
    return bool((labels.groupby(others)[name].nunique() > 1).any())


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
    """Tell if a setting is redundant."""
    return not _SPARE.isdisjoint(name.split("."))


def _sort_key(text: str) -> tuple[int, float, str]:
    """Return the sort key of a setting's text: `none` first, then numbers, then words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (-1, 0.0, "") if text == "none" else (1, 0.0, text)
