"""One table of many runs: rows of runs that differ only in their seed, a column for whatever varies."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from permllm.errors import ConfigError
from permllm.runs.measures import (
    METHODS,
    Measure,
    column_names,
    method_of,
    number,
    pruning_minutes,
    setting_text,
)
from permllm.runs.read import Run

DENSE = "dense: "
GAP = "gap closed"
ZEROS = "zeros"
_PERPLEXITY = " perplexity ("
_STATISTICS = "calibration.statistics"
# What comes with a method, and need not be equal in the row from which a gap is measured.
_OF_METHODS = {*METHODS, "temperature", "block_size", _STATISTICS, "inputs.permutation.path"}
# Settings that others say already: sizes of a model beside its name, paths beside the digests of
# their files.
_SPARE = {
    "inputs",
    "_target_",
    "path",
    "data_files",
    "architecture",
    "device",
    "hub_name",
    "source",
    "revision",
}
# Settings that tell two models apart.
_OF_MODELS = (
    "model.name",
    "model.hub_name",
    "model.revision",
    "model.architecture",
    "inputs.model.path",
)
# Columns that stand first.
_FIRST: tuple[str, ...] = (
    "model",
    "sparsity",
    "pruner",
    "permutation",
    "permutation.constraint",
    "mask",
    "reconstruction",
)
_FIRST += ("temperature", "block_size")


def measures_of(runs: list[Run]) -> list[dict[str, Measure]]:
    """Return the measures of each run by column: those of the sparse model, and after `dense: ` those of the dense one."""
    named = column_names([key for run in runs for key in (*run.sparse, *run.dense)])
    return [
        {named[key]: measure for key, measure in run.sparse.items()}
        | {f"{DENSE}{named[key]}": measure for key, measure in run.dense.items()}
        for run in runs
    ]


def frame_of(runs: list[Run], measures: list[dict[str, Measure]]) -> pd.DataFrame:
    """Return settings, `seed`, `method`, measures, `minutes` and `directory` of each run."""
    lines = []
    for run, found in zip(runs, measures, strict=True):
        line = {
            **{name: value for name, value in run.settings().items() if not _is_spare(name)},
            "seed": run.config["seed"],
            "method": str(run.config.get("method") or ""),
            **{name: measure.value for name, measure in found.items()},
            "minutes": pruning_minutes(run.metrics["seconds"]),
            "directory": str(run.directory),
        }
        lines.append(line)
    return pd.DataFrame(lines)


class Table:
    """Runs beside each other.

    Attributes:
        runs: the runs.
        frame: a row a run (`frame_of`), with the gaps that it closes, and the number of its `row`.
        rows: for each row the numbers of its runs, which differ only in their seed.
        baseline: row that others are compared with; None: no one.
        settings: columns of settings that are shown.
        measures: columns of measures that are shown.
        kinds: kind of each measure.
        gaps: perplexities that each measure of a gap is the mean over.
        means: mean over the seeds: rows by measures; not a number where a run lacks the measure.
        deviations: standard deviation over the seeds, likewise.
        dense: value and standard error of the measures of the dense model that all runs share.
        starts: for each row that has a gap the row from which it is measured.
        notes: lines for the reader.
    """

    def __init__(self, runs: list[Run], baseline: str | None = None) -> None:
        """Take some runs; `baseline` names a row as `find` takes it, from which the gaps of its model are measured."""
        self.runs, self._values = runs, measures_of(runs)
        self.frame = frame_of(runs, self._values)
        found = {
            name: measure
            for run in self._values
            for name, measure in run.items()
            if not name.startswith(DENSE)
        }
        self.kinds = {name: measure.kind for name, measure in found.items()}
        self.measures = [name for name, measure in found.items() if not measure.asked_for]
        texts = pd.DataFrame(
            [{key: setting_text(value) for key, value in run.settings().items()} for run in runs]
        )
        keys = pd.Series([run.key("seed") for run in runs])
        self.labels = texts.fillna("").assign(method=self.frame["method"])[~keys.duplicated()]
        self.settings = self._varying()
        self.labels = self.labels.sort_values(
            self.settings, key=lambda column: column.map(_sort_key)
        )
        self.rows = [[*keys.index[keys == keys[run]]] for run in self.labels.index]
        self.labels = self.labels.reset_index(drop=True)
        self.frame["row"] = pd.Series(
            {run: row for row, members in enumerate(self.rows) for run in members}
        )
        self._take_method()
        self.baseline = self.find(baseline, "--baseline") if baseline else None
        self.starts, self.gaps = self._starts(), dict[str, list[str]]()
        of_gaps = self._close_gaps()
        grouped = self.frame.groupby("row")[[*self.kinds]]
        whole = grouped.count().eq(grouped.size(), axis=0)
        self.means, self.deviations = grouped.mean().where(whole), grouped.std().where(whole)
        self.dense = self._shared_dense()
        patterns = [name for name in self.settings if name.startswith(("sparsity", "keep_dense"))]
        if not patterns and self.means[ZEROS].map("{:.2%}".format).nunique() == 1:
            self.measures.remove(ZEROS)
            del self.kinds[ZEROS]
        self.notes = self._missing() + of_gaps

    def _close_gaps(self) -> list[str]:
        """Add the measure `gap closed` (`gap_closed`), of several texts the mean and a measure of each; return notes."""
        perplexities = [name for name in self.measures if self.kinds[name] == "perplexity"]
        dense = [f"{DENSE}{name}" for name in perplexities]
        closed = pd.DataFrame(math.nan, self.frame.index, perplexities)
        for row, start in self.starts.items():
            end = self.seeds(row, dense).set_axis(perplexities, axis=1)
            closed.loc[self.rows[row]] = gap_closed(
                self.seeds(row, perplexities), self.seeds(start, perplexities), end
            ).to_numpy()
        closed = closed.dropna(axis=1, how="all")
        if closed.empty:
            return []
        common = closed.columns[closed.dropna(how="all").notna().all()]
        # A text that was measured in two ways counts once.
        shared = [*{name.partition(_PERPLEXITY)[0]: name for name in common}.values()]
        self.gaps, notes = {GAP: shared} if shared else {}, list[str]()
        if len(closed.columns) > 1:
            self.gaps |= {name.replace(_PERPLEXITY, f" {GAP} (", 1): [name] for name in closed}
            mean = (
                f"the mean over {', '.join(shared)}"
                if shared
                else "no text is in all rows, so that each stands alone"
            )
            notes.append(f"{GAP}: {mean}")
        for gap, names in self.gaps.items():
            self.frame[gap] = closed[names].mean(axis=1, skipna=False)
            self.kinds[gap] = "share"
        last = self.measures.index(closed.columns[-1]) + 1
        self.measures[last:last] = [*self.gaps]
        pruners = sorted({self.label(row, "pruner") for row in self.starts})
        if len(pruners) > 1 and self.baseline is None:
            own = f"each pruner's own model without a permutation, so that those of {' and '.join(pruners)} do not compare"
            notes.append(f"{GAP}: measured from {own}; --baseline names one row for all")
        return notes

    def find(self, text: str, option: str) -> int:
        """Return the row with some settings, given as `name=value,name=value` after an option.

        Raises:
            ConfigError: a name is no setting, or not exactly one row has the values.
        """
        # A value may be a list: a comma parts settings where a name follows.
        wanted = dict(part.partition("=")[::2] for part in re.split(r",(?=[\w.]+=)", text))
        rows = [*self.labels.index]
        for name, value in wanted.items():
            present = [found for found in self.labels.get(name, pd.Series()).unique() if found]
            if not present:
                raise ConfigError(
                    f"{option} {text}: {name} is no column; valid are {', '.join(self.settings)}"
                )
            if value not in present:
                raise ConfigError(
                    f"{option} {text}: no row has {name}={value}; valid are {', '.join(present)}"
                )
            rows = [row for row in rows if self.label(row, name) == value]
        if len(rows) != 1:
            differ = ", ".join(
                name for name in self.settings if self.labels.loc[rows, name].nunique() > 1
            )
            ending = f"; they differ in {differ}: add one" if rows else ""
            raise ConfigError(f"{option} {text}: {len(rows)} rows have these settings{ending}")
        return rows[0]

    def label(self, row: int, name: str) -> str:
        """Return the value of a setting of a row as it is typed; empty where the row has no such setting."""
        return str(self.labels.at[row, name]) if name in self.labels else ""

    def first(self, row: int) -> Run:
        """Return the first run of a row."""
        return self.runs[self.rows[row][0]]

    def seeds(self, row: int, names: list[str]) -> pd.DataFrame:
        """Return some measures of each run of a row by its seed; not a number where a run lacks one."""
        found = self.frame.reindex(columns=["seed", *names]).loc[self.rows[row]]
        return found.set_index("seed").astype(float)

    def value(self, run: int, name: str) -> Measure | None:
        """Return a measure of a run with what belongs to it; `name` as in `frame`."""
        return self._values[run].get(name)

    def has(self, row: int, name: str) -> bool:
        """Tell whether all runs of a row have a measure."""
        return name in self.means and not math.isnan(self.means.at[row, name])

    def error(self, row: int, name: str) -> float | None:
        """Return the deviation over the seeds of a row, or the standard error of its only run; None where it is not known."""
        if len(self.rows[row]) > 1:
            return float(self.deviations.at[row, name])
        return value.stderr if (value := self.value(self.rows[row][0], name)) else None

    def shown(self, row: int, name: str) -> str:
        """Return the mean of a measure with its error; empty where the row lacks it."""
        return (
            number(self.means.at[row, name], self.kinds[name], self.error(row, name))
            if self.has(row, name)
            else ""
        )

    def shown_dense(self, name: str) -> str:
        """Return the value of the dense model that all rows share; empty for none."""
        return (
            number(self.dense[name][0], self.kinds[name], self.dense[name][1])
            if name in self.dense
            else ""
        )

    def limited(self, name: str) -> bool:
        """Tell whether some value of an accuracy is of a part of the items."""
        return self.kinds[name] in ("accuracy", "number") and any(
            run[name].limited for run in self._values if name in run
        )

    def heading(self, name: str) -> str:
        """Return a measure's name, with a word where it is of a part of the items."""
        return f"{name} (limited)" if self.limited(name) else name

    def show(self, columns: str | None, measures: str | None) -> None:
        """Show some settings and measures alone.

        Args:
            columns: names of settings, with commas; None: those that vary.
            measures: with ", " between them, each the name of a measure or a part of the names of
                several; None: all but those that are shown only where they are asked for.

        Raises:
            ConfigError: there is no such setting or measure.
        """
        if columns:
            self.settings = _ranked(name for name in self.labels if name in columns.split(","))
            if not self.settings:
                raise ConfigError(
                    f"--columns {columns}: expected settings, such as {', '.join(self._varying())}"
                )
        if measures:
            every = [*self.measures, *(name for name in self.kinds if name not in self.measures)]
            chosen: set[str] = set()
            for part in measures.split(", "):
                named = (
                    [part] if part in every else [name for name in self.measures if part in name]
                )
                chosen |= {*named} or {name for name in every if part in name}
            if not chosen:
                raise ConfigError(
                    f"--measures {measures}: expected names, or parts of names, of {', '.join(self.kinds)}"
                )
            self.measures = [name for name in every if name in chosen]

    def main(self) -> str | None:
        """Return the measure that rows are compared by.

        The perplexity that all rows have; of several their mean gap, if all gaps have one start.
        Otherwise the average accuracy, otherwise the first accuracy; where rows share nothing, the
        first perplexity or accuracy.
        """
        perplexities, accuracies = (
            [name for name in self.measures if self.kinds[name] == kind]
            for kind in ("perplexity", "accuracy")
        )
        shared = [name for name in self.means if self.means[name].notna().all()]
        if GAP in self.measures and len({*perplexities} & {*shared}) > 1 and self.one_start():
            return GAP
        every = [
            *perplexities,
            *sorted(accuracies, key=lambda name: not name.startswith("average acc")),
        ]
        return next((name for name in every if name in shared), every[0] if every else None)

    def one_start(self) -> bool:
        """Tell whether the gaps of all rows of a model and a pattern are measured from one row."""
        starts = {
            (self._model(row), self.label(row, "sparsity"), start)
            for row, start in self.starts.items()
            if self.gaps
        }
        return len(starts) == len({start[:2] for start in starts})

    def names(self) -> list[str]:
        """Return a short name for each row: its method, and what is unusual in it."""
        names = []
        for row in self.labels.index:
            parts = []
            # A name that is cut short can spare the calibration.
            for name in sorted(self.settings, key=lambda name: name.startswith("calibration.")):
                value, group = self.label(row, name), name.partition(".")[0]
                if name in ("method", "model", "sparsity", "pruner", *METHODS):
                    parts += [value] if name == "permutation" or value != METHODS.get(name) else []
                    continue
                of_group = group in self.labels and name != group
                alike = (
                    self.labels[self.labels[group] == self.label(row, group)]
                    if of_group
                    else self.labels
                )
                if value and (
                    len(self.settings) <= 3 or value != Counter(alike[name]).most_common(1)[0][0]
                ):
                    parts.append(
                        f"{'.'.join(name.removeprefix('permutation.').split('.')[-2:])}={value}"
                    )
            names.append(", ".join(filter(None, parts)) or self.first(row).metrics["name"])
        return names

    def fastest(self, row: int) -> int:
        """Return the run of a row that took the fewest minutes: seeds do the same work, and other jobs only add to it."""
        return int(self.frame["minutes"][self.rows[row]].idxmin())

    def memory(self, row: int) -> int:
        """Return the largest peak of memory in bytes of the runs whose products have the format of the fastest run."""
        alike = [
            run for run in self.rows[row] if self._format(run) == self._format(self.fastest(row))
        ]
        return max(int(self.runs[run].metrics["peak_memory_bytes"]) for run in alike)

    def _format(self, run: int) -> str:
        return str(self.runs[run].metrics.get("compute_dtype"))

    def learned_elsewhere(self, row: int) -> bool:
        """Tell whether a row's permutation is another run's, so that its own minutes say nothing."""
        return self.label(row, "permutation") == "from_file"

    def _varying(self) -> list[str]:
        """Return settings that have several values in the rows, and others where these do not tell two rows apart."""
        texts = self.labels.drop(columns="method")
        usual = [name for name in texts if not _is_spare(name)]
        varying = [name for name in usual if texts[name][texts[name] != ""].nunique() > 1]
        # A table always tells which linears have another pattern.
        varying += [
            name
            for name in usual
            if name.startswith(("keep_dense", "sparsity_of")) and texts[name].nunique() > 1
        ]
        for names in (usual, list(texts)):
            if texts[varying].duplicated().any() or (not varying and len(texts) > 1):
                for _, alike in texts.groupby(varying or (lambda _: 0)):
                    varying += [
                        name for name in names if name not in varying and alike[name].nunique() > 1
                    ]
        return _ranked(dict.fromkeys(varying)) or ["pruner", "permutation"]

    def _take_method(self) -> None:
        """Show the column `method` in place of the settings of methods, where it tells the rows apart."""
        groups = {"pruner", "temperature", "block_size", *METHODS}
        rest = ["method", *(name for name in self.settings if name.split(".")[0] not in groups)]
        one = (self.frame.groupby("row")["method"].nunique() == 1).all() and (
            self.frame["method"] != ""
        ).all()
        if len(self.rows) > 1 and one and not self.labels[rest].duplicated().any():
            self.settings = rest

    def _shared_dense(self) -> dict[str, tuple[float, float | None]]:
        found = {}
        for name in self.kinds:
            values, first = self.frame.get(f"{DENSE}{name}"), self.value(0, f"{DENSE}{name}")
            # Machines sum up in other orders.
            if first and np.isclose(values, first.value, rtol=1e-4, atol=0).all():
                found[name] = (first.value, first.stderr)
        return found

    def _missing(self) -> list[str]:
        notes, own = [], [name for name in self.measures if name not in self.gaps]
        for row, members in enumerate(self.rows):
            some = self.frame.loc[members, own].notna()
            missing = some.columns[some.any() & ~some.all()]
            where = ", ".join(filter(None, self.labels.loc[row, self.settings]))
            if len(formats := sorted({self._format(run) for run in members})) > 1:
                notes.append(f"{where}: products of the seeds are in {' and '.join(formats)}")
            if len(missing):
                notes.append(
                    f"{', '.join(missing)}: left out of {where}: some of its {len(some)} seeds lack it"
                )
        lacking = [
            name
            for name in own
            if self.kinds[name] == "perplexity" and self.means[name].isna().any()
        ]
        return notes + ([f"some rows lack {', '.join(lacking)}"] if lacking else [])

    def _starts(self) -> dict[int, int]:
        """Return by row the row from which its gap is measured: of several the one of the same statistics."""
        if self.baseline is not None:
            return {
                row: self.baseline
                for row in self.labels.index
                if self._model(row) == self._model(self.baseline)
            }
        found, beside = {}, []
        for run in map(self.first, self.labels.index):
            of_methods = (name for name in run.identity if {name, name.split(".")[0]} & _OF_METHODS)
            beside.append(run.key("seed", *of_methods))
        for row in self.labels.index:
            like = [other for other in self.labels.index if beside[other] == beside[row]]
            plain = [other for other in like if method_of(self.first(other).config) == "none"]
            same = [
                other
                for other in plain
                if self.label(other, _STATISTICS) == self.label(row, _STATISTICS)
            ]
            if plain:
                found[row] = row if row in plain else (same or plain)[0]
        return found

    def _model(self, row: int) -> str:
        run = self.first(row)
        return run.key(*(name for name in run.identity if not name.startswith(_OF_MODELS)))


def gap_closed(here: pd.DataFrame, start: pd.DataFrame, end: pd.DataFrame) -> pd.DataFrame:
    """Return the share of the log-perplexity between the unpermuted and the dense model that each run of a row closes.

    The mean over seeds is `(ln p_start - ln p_here) / (ln p_start - ln p_end)` of the means of the
    logarithms. A run is measured from the unpermuted model of its seed, if there is one of each
    seed.

    Args:
        here: perplexities of the row, by seed and text.
        start: perplexities of the unpermuted model, by seed and text.
        end: perplexities of the dense model, by seed and text.

    Returns:
        By seed and text; not a number where a perplexity is not finite or the unpermuted model is
        as good as the dense one.
    """
    here, start, end = np.log(here), np.log(start), np.log(end)
    whole = start.mean(skipna=False) - end.mean(skipna=False)
    own = start.reindex(here.index) if set(here.index) == set(start.index) else start.mean()
    closed = (own - here) / whole.where((whole > 0) & np.isfinite(whole))
    closed.loc[:, ~np.isfinite(closed).all()] = math.nan
    return closed


def _ranked(names: Iterable[str]) -> list[str]:
    return sorted(
        names, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)
    )


def _is_spare(name: str) -> bool:
    """Tell whether a setting says nothing that others do not say."""
    return not _SPARE.isdisjoint(name.split("."))


def _sort_key(text: str) -> tuple[int, float, str]:
    """Return the key by which settings are sorted: `none` first, then numbers, then words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (-1, 0.0, "") if text == "none" else (1, 0.0, text)
