"""One table of many runs: rows of runs that differ only in their seed, a column for whatever varies."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from permllm.errors import ConfigError
from permllm.runs.dataframe import DENSE, METHODS, frame_of, is_spare, measures_of, number, setting_text, settings_of, sort_key
from permllm.runs.measures import Measure
from permllm.runs.read import Run

GAP = "gap closed"
ZEROS = "zeros"
_PERPLEXITY = " perplexity ("
# What comes with a method, and need not be equal in the row from which a gap is measured.
_OF_METHODS = {*METHODS, "temperature", "block_size", "calibration.statistics", "inputs.permutation.path"}
# Columns that stand first.
_FIRST = [
    "model",
    "sparsity",
    "pruner",
    "permutation",
    "permutation.constraint",
    "mask",
    "reconstruction",
    "temperature",
    "block_size",
]


class Table:
    """Runs beside each other.

    Attributes:
        runs: the runs.
        frame: a row a run (`permllm.runs.dataframe`), with the gaps that it closes, and the number of its `row`.
        rows: for each row the numbers of its runs, which differ only in their seed.
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

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self._values = runs, measures_of(runs)
        self.frame = frame_of(runs, self._values)
        found = {name: measure for run in self._values for name, measure in run.items() if not name.startswith(DENSE)}
        self.kinds = {name: measure.kind for name, measure in found.items()}
        self.measures = [name for name, measure in found.items() if not measure.asked_for]
        texts = pd.DataFrame([{key: setting_text(value) for key, value in settings_of(run).items()} for run in runs]).fillna(
            ""
        )
        members: dict[str, list[int]] = {}
        for run, one in enumerate(runs):
            key = {name: value for name, value in one.identity.items() if name != "seed"}
            members.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
        self.labels = texts.assign(method=self.frame["method"]).iloc[[runs_[0] for runs_ in members.values()]]
        self.settings = self._varying()
        keys = self.labels[self.settings].map(sort_key).apply(list, axis=1)
        order = sorted(range(len(keys)), key=lambda row: keys.iloc[row])
        self.labels, self.rows = self.labels.iloc[order].reset_index(drop=True), [[*members.values()][row] for row in order]
        self.frame["row"] = pd.Series({run: row for row, runs_ in enumerate(self.rows) for run in runs_})
        self._take_method()
        self._summarise()
        self.dense = self._shared_dense()
        configs = [
            [self.config(row).get(key) or None for key in ("sparsity", "keep_dense", "sparsity_of")] for row in self._range()
        ]
        if all(one == configs[0] for one in configs) and self.means[ZEROS].map("{:.2%}".format).nunique() == 1:
            self.measures.remove(ZEROS)
            del self.kinds[ZEROS]
        self.notes = self._missing()
        self.close_gaps()

    def close_gaps(self, baseline: int | None = None) -> None:
        """Add the measure `gap closed` (`gap_closed`): of several texts the mean, and a measure of each text.

        Args:
            baseline: row from which all rows of its model are measured; None: each from the row with the same settings but
                `permutation=none`, `mask=pruner` and `reconstruction=none`.
        """
        self.frame = self.frame.drop(columns=[name for name in self.frame if GAP in name])
        self.measures = [name for name in self.measures if GAP not in name]
        self.notes = [note for note in self.notes if not note.startswith(GAP)]
        self.starts = {row: start for row in self._range() if (start := self._start(row, baseline)) is not None}
        perplexities = [name for name in self.measures if self.kinds[name] == "perplexity"]
        closed = pd.DataFrame(np.nan, self.frame.index, perplexities)
        for row, start in self.starts.items():
            for name in perplexities:
                one = gap_closed(self.seeds(row, name), self.seeds(start, name), self.seeds(row, f"{DENSE}{name}"))
                closed.loc[self.rows[row], name] = one.to_numpy()
        closed = closed.dropna(axis=1, how="all")
        common = closed.columns[closed.dropna(how="all").notna().all()]
        # A text that was measured in two ways counts once.
        shared = [*{name.partition(_PERPLEXITY)[0]: name for name in common}.values()]
        each = {gap_of(name): [name] for name in closed} if len(closed.columns) > 1 else {}
        self.gaps = ({GAP: shared} if shared else {}) | each
        for gap, names in self.gaps.items():
            self.frame[gap] = closed[names].mean(axis=1, skipna=False)
            self.kinds[gap] = "share"
        if len(closed.columns):
            last = self.measures.index(closed.columns[-1]) + 1
            self.measures[last:last] = [*self.gaps]
        if each:
            mean = f"the mean over {', '.join(shared)}" if shared else "no text is in all rows, so that each stands alone"
            self.notes.append(f"{GAP}: {mean}")
        pruners = sorted({self.label(row, "pruner") for row in self.starts})
        if len(pruners) > 1 and baseline is None and self.gaps:
            own = (
                f"from each pruner's own model without a permutation, so that those of {' and '.join(pruners)} do not compare"
            )
            self.notes.append(f"{GAP}: measured {own}; --baseline names one row for all")
        self._summarise()

    def label(self, row: int, name: str) -> str:
        """Return the value of a setting of a row as it is typed; empty where the row has no such setting."""
        return str(self.labels.at[row, name]) if name in self.labels else ""

    def config(self, row: int) -> dict[str, Any]:
        """Return the settings of the first run of a row."""
        return self.runs[self.rows[row][0]].config

    def seeds(self, row: int, name: str) -> pd.Series:
        """Return a measure of each run of a row by its seed."""
        found = self.frame.reindex(columns=["seed", name]).loc[self.rows[row]]
        return found.set_index("seed")[name].astype(float)

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
        value = self.value(self.rows[row][0], name)
        return value.stderr if value else None

    def shown(self, row: int, name: str) -> str:
        """Return the mean of a measure with its error; empty where the row lacks it."""
        return number(self.means.at[row, name], self.kinds[name], self.error(row, name)) if self.has(row, name) else ""

    def shown_dense(self, name: str) -> str:
        """Return the value of the dense model that all rows share; empty for none."""
        value, error = self.dense.get(name, (None, None))
        return "" if value is None else number(value, self.kinds[name], error)

    def limited(self, name: str) -> bool:
        """Tell whether some value of an accuracy is of a part of the items."""
        values = [run[name] for run in self._values if name in run]
        return self.kinds[name] in ("accuracy", "number") and any(value.limited for value in values)

    def heading(self, name: str) -> str:
        """Return a measure's name, with a word where it is of a part of the items."""
        return f"{name} (limited)" if self.limited(name) else name

    def show(self, columns: str | None, measures: str | None) -> None:
        """Show some settings and measures alone.

        Args:
            columns: names of settings, with commas; None: those that vary.
            measures: with ", " between them, each the name of a measure or a part of the names of several; None: all but those
                that are shown only where they are asked for.

        Raises:
            ConfigError: there is no such setting or measure.
        """
        if columns:
            self.settings = _ranked(name for name in self.labels if name in columns.split(","))
            if not self.settings:
                raise ConfigError(f"--columns {columns}: expected settings, such as {', '.join(self._varying())}")
        if measures:
            hidden = [name for name in self.kinds if name not in self.measures]
            chosen: set[str] = set()
            for part in measures.split(", "):
                found = [name for name in self.measures if part in name] or [name for name in hidden if part in name]
                chosen |= {part} if part in self.kinds else set(found)
            if not chosen:
                raise ConfigError(f"--measures {measures}: expected names, or parts of names, of {', '.join(self.kinds)}")
            self.measures = [name for name in [*self.measures, *hidden] if name in chosen]

    def main(self) -> str | None:
        """Return the measure that rows are compared by.

        The perplexity that all rows have; of several their mean gap, if all gaps have one start. Otherwise the average
        accuracy, otherwise the first accuracy; where rows share nothing, the first perplexity or accuracy.
        """
        perplexities = [name for name in self.measures if self.kinds[name] == "perplexity"]
        accuracies = [name for name in self.measures if self.kinds[name] == "accuracy"]
        every = [*perplexities, *sorted(accuracies, key=lambda name: not name.startswith("average acc"))]
        shared = [name for name in every if self.means[name].notna().all()]
        several = len([name for name in shared if name in perplexities]) > 1
        return next(iter([GAP] * (several and GAP in self.measures and self.one_start()) + shared + every), None)

    def one_start(self) -> bool:
        """Tell whether the gaps of all rows of a model and a pattern are measured from one row."""
        starts = {(self._model(row), self.label(row, "sparsity"), start) for row, start in self.starts.items() if self.gaps}
        return len(starts) == len({start[:2] for start in starts})

    def names(self) -> list[str]:
        """Return a short name for each row: its method, and what is unusual in it."""
        few = len(self.settings) <= 3
        names = []
        for row in self._range():
            parts = []
            # A name that is cut short can spare the calibration.
            for name in sorted(self.settings, key=lambda name: name.startswith("calibration.")):
                value, group = self.label(row, name), name.partition(".")[0]
                alike = (
                    self.labels[self.labels[group] == self.label(row, group)]
                    if group in self.labels and name != group
                    else self.labels
                )
                usual = METHODS.get(name, "") if name in ("mask", "reconstruction") else ""
                if name in ("method", "model", "sparsity", "pruner", *METHODS):
                    parts += [value] if value != usual else []
                elif value and (few or value != Counter(alike[name]).most_common(1)[0][0]):
                    parts.append(f"{'.'.join(name.removeprefix('permutation.').split('.')[-2:])}={value}")
            names.append(", ".join(parts) or self.runs[self.rows[row][0]].metrics["name"])
        return names

    def fastest(self, row: int) -> int:
        """Return the run of a row that took the fewest minutes: seeds do the same work, and other jobs only add to it."""
        return int(self.frame["minutes"][self.rows[row]].idxmin())

    def memory(self, row: int) -> int:
        """Return the largest peak of memory in bytes of the runs whose products have the format of the fastest run."""
        like = self.runs[self.fastest(row)].metrics.get("compute_dtype")
        runs = [self.runs[run].metrics for run in self.rows[row]]
        return max(int(metrics["peak_memory_bytes"]) for metrics in runs if metrics.get("compute_dtype") == like)

    def learned_elsewhere(self, row: int) -> bool:
        """Tell whether a row's permutation is another run's, so that its own minutes say nothing."""
        return bool(self.config(row)["permutation"]["name"] == "from_file")

    def _range(self) -> range:
        return range(len(self.rows))

    def _summarise(self) -> None:
        grouped = self.frame.groupby("row")[[name for name in self.kinds if name in self.frame]]
        whole = grouped.count().eq(grouped.size(), axis=0)
        self.means, self.deviations = grouped.mean().where(whole), grouped.std().where(whole)

    def _varying(self) -> list[str]:
        """Return settings that have several values in the rows, and others where these do not tell two rows apart."""
        texts = self.labels.drop(columns="method")
        usual = [name for name in texts if not is_spare(name)]
        varying = [name for name in usual if texts[name][texts[name] != ""].nunique() > 1]
        # A table always tells which linears have another pattern.
        varying += [name for name in usual if name.startswith(("keep_dense", "sparsity_of")) and texts[name].nunique() > 1]
        for names in (usual, list(texts)):
            if texts[varying].duplicated().any() or (not varying and len(texts) > 1):
                for _, alike in texts.groupby(varying or (lambda _: 0)):
                    varying += [name for name in names if name not in varying and alike[name].nunique() > 1]
        return _ranked(dict.fromkeys(varying)) or ["pruner", "permutation"]

    def _take_method(self) -> None:
        """Show the column `method` in place of the settings of methods, where it tells the rows apart."""
        groups = {"pruner", "temperature", "block_size", *METHODS}
        rest = ["method", *(name for name in self.settings if name.split(".")[0] not in groups)]
        one = (self.frame.groupby("row")["method"].nunique() == 1).all() and (self.frame["method"] != "").all()
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
        notes = []
        for row in self._range():
            where = ", ".join(filter(None, self.labels.loc[row, self.settings]))
            formats = sorted({str(self.runs[run].metrics.get("compute_dtype")) for run in self.rows[row]})
            notes += [f"{where}: products of the seeds are in {' and '.join(formats)}"] if len(formats) > 1 else []
            some = self.frame.loc[self.rows[row], self.measures].notna()
            missing = some.columns[some.any() & ~some.all()]
            notes += (
                [f"{', '.join(missing)}: left out of {where}: some of its {len(some)} seeds lack it"] if len(missing) else []
            )
        lacking = [name for name in self.measures if self.kinds[name] == "perplexity" and self.means[name].isna().any()]
        return notes + ([f"some rows lack {', '.join(lacking)}"] if lacking else [])

    def _model(self, row: int) -> str:
        config = self.config(row)
        facts = {key: config["model"].get(key) for key in ("name", "hub_name", "revision", "architecture")}
        return json.dumps([facts, (config.get("inputs") or {}).get("model.path")], sort_keys=True)

    def _start(self, row: int, baseline: int | None) -> int | None:
        """Return the row from which a row's gap is measured: of several the one of the same statistics."""
        if baseline is not None:
            return baseline if self._model(baseline) == self._model(row) else None
        beside = [self._beside_methods(other) for other in self._range()]
        rows = [other for other in self._range() if self._unpermuted(other) and beside[other] == beside[row]]
        statistics = self.label(row, "calibration.statistics")
        rows.sort(key=lambda other: (other != row, self.label(other, "calibration.statistics") != statistics))
        return next(iter(rows), None)

    def _unpermuted(self, row: int) -> bool:
        return all((self.config(row).get(group) or {}).get("name", usual) == usual for group, usual in METHODS.items())

    def _beside_methods(self, row: int) -> dict[str, Any]:
        flat = self.runs[self.rows[row][0]].identity
        return {key: v for key, v in flat.items() if key != "seed" and not {key, key.split(".")[0]} & _OF_METHODS}


def gap_closed(here: pd.Series, start: pd.Series, end: pd.Series) -> pd.Series:
    """Return the share of the log-perplexity between the unpermuted and the dense model that each run of a row closes.

    The mean over seeds is `(ln p_start - ln p_here) / (ln p_start - ln p_end)` of the means of the logarithms. A run is
    measured from the unpermuted model of its seed, if there is one of each seed.

    Args:
        here: perplexity of the row by seed.
        start: perplexity of the unpermuted model by seed.
        end: perplexity of the dense model by seed.

    Returns:
        By seed; not a number where a perplexity is not finite or the unpermuted model is as good as the dense one.
    """
    here, start, end = np.log(here), np.log(start), np.log(end)
    whole = start.mean(skipna=False) - end.mean(skipna=False)
    own = start.reindex(here.index) if set(here.index) == set(start.index) else start.mean()
    closed = (own - here) / (whole if 0 < whole < math.inf else math.nan)
    return closed if np.isfinite(closed).all() else closed * math.nan


def gap_of(name: str) -> str:
    """Return the measure of the gap on one text alone, by the name of the perplexity."""
    return name.replace(_PERPLEXITY, f" {GAP} (", 1)


def _ranked(names: Iterable[str]) -> list[str]:
    rank = {name: place for place, name in enumerate(_FIRST)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def summarise(runs: list[Run]) -> Table:
    """Return the table of some runs."""
    return Table(runs)
