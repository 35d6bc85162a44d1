"""Table of many runs: a row for runs with equal settings, a column for each varying setting."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from permllm.errors import ConfigError
from permllm.report.measures import FP8, METHODS, Measure, column_names, number, setting_text
from permllm.report.read import Run

DENSE = "dense: "
GAP = "gap closed"
_ZEROS = "zeros"
_PERPLEXITY = " perplexity ("
_STATISTICS = "calibration.statistics"
# Settings that belong to a method. The row from which a gap is measured may have other values.
_OF_METHODS = {*METHODS, "temperature", "block_size", _STATISTICS, "inputs.permutation.path"}
# Parts of the names of redundant settings, such as sizes of a model beside its name, and paths
# beside the digests of their files.
_SPARE = {
    *("inputs", "path", "data_files", "architecture", "device", "hub_name", "source", "revision"),
    "_target_",
}
# Settings that distinguish two models.
_OF_MODEL = re.compile(r"model\.(name|hub_name|revision|architecture)|inputs\.model\.path")
# Settings with the patterns of single linears. A table always shows them if they vary.
_PATTERNS = ("keep_dense", "sparsity_of")
# Order of the first columns.
_FIRST = [
    *("model", "sparsity", "pruner", "permutation", "permutation.constraint", "mask"),
    *("reconstruction", "temperature", "block_size"),
]


def measures_of(runs: list[Run]) -> list[dict[str, Measure]]:
    """Return each run's measures by column; those of the dense model begin with `dense: `."""
    named = column_names([key for run in runs for key in (*run.sparse, *run.dense)])
    return [
        {named[key]: measure for key, measure in run.sparse.items()}
        | {f"{DENSE}{named[key]}": measure for key, measure in run.dense.items()}
        for run in runs
    ]


def frame_of(runs: list[Run], measures: list[dict[str, Measure]]) -> pd.DataFrame:
    """Return a row for each run: settings, seed, method, measures, minutes and directory."""
    return pd.DataFrame(
        {name: value for name, value in run.settings().items() if not _is_spare(name)}
        | {"seed": run.config["seed"], "method": str(run.config.get("method") or "")}
        | {name: measure.value for name, measure in run_measures.items()}
        | {"minutes": run.minutes, "directory": str(run.directory)}
        for run, run_measures in zip(runs, measures, strict=True)
    )


class Table:
    """Table of runs, with means over seeds, gaps and the baseline.

    Attributes:
        runs: the runs.
        values: measures of each run, by column.
        frame: one row for each run (`frame_of`), with its gaps closed and the index of its `row`.
        rows: for each row the indices of its runs, which differ only in their seed.
        labels: texts of each row's settings; empty: the row has no such setting.
        baseline: row with which others are compared; None: there is none.
        settings: columns of settings that are shown.
        measures: columns of measures that are shown.
        kinds: kind of each measure.
        gaps: for each measure of a gap the perplexities over which it is the mean.
        means: means over the seeds, rows by measures; NaN: a run of the row lacks the measure.
        deviations: standard deviations over the seeds, as `means`.
        dense: value and standard error of the measures of the dense model that all runs share.
        starts: for each row with a gap the row from which the gap is measured.
        notes: lines for the reader.
    """

    def __init__(self, runs: list[Run], baseline: str | None = None) -> None:
        """Make the table. Gaps of the baseline's model are measured from the baseline."""
        self.runs = runs
        self.values = measures_of(runs)
        self.frame = frame_of(runs, self.values)
        every = [item for run in self.values for item in run.items()]
        sparse = {name: measure for name, measure in every if not name.startswith(DENSE)}
        self.kinds = {name: measure.kind for name, measure in sparse.items()}
        self.measures = [name for name, measure in sparse.items() if not measure.asked_for]
        texts = (
            {key: setting_text(value) for key, value in run.settings().items()} for run in runs
        )
        keys = pd.Series([run.key("seed") for run in runs])
        labels = pd.DataFrame(texts).fillna("").assign(method=self.frame["method"])
        self.labels = labels[~keys.duplicated()]
        self.settings = self._varying()
        self.labels = self.labels.sort_values(self.settings, key=lambda texts: texts.map(_sort_key))
        self.rows = [[*keys.index[keys == keys[run]]] for run in self.labels.index]
        self.labels = self.labels.reset_index(drop=True)
        members = pd.Series(self.rows).explode()
        self.frame["row"] = pd.Series(members.index, members)
        self._take_method()
        self.baseline = self.find(baseline, "--baseline") if baseline else None
        self.starts = self._starts()
        self.gaps: dict[str, list[str]] = {}
        self.notes = self._close_gaps()
        grouped = self.frame.groupby("row")[[*self.kinds]]
        whole = grouped.count().eq(grouped.size(), axis=0)
        self.means = grouped.mean().where(whole)
        self.deviations = grouped.std().where(whole)
        some = (grouped.count().gt(0) & ~whole).any()
        if some.any():
            self.notes.append(f"some seeds of a row lack {', '.join(some.index[some])}")
        self.dense = self._shared_dense()
        patterns = any(name.startswith(("sparsity", "keep_dense")) for name in self.settings)
        if not patterns and self.means[_ZEROS].map("{:.2%}".format).nunique() == 1:
            self.measures.remove(_ZEROS)
            del self.kinds[_ZEROS]

    def _varying(self) -> list[str]:
        """Return the settings that vary, and redundant ones if two rows would look the same."""
        texts = self.labels.drop(columns="method")
        usual = [name for name in texts if not _is_spare(name)]
        varying = []
        for name in usual:
            compared = texts[name]
            if not name.startswith(_PATTERNS):
                compared = compared[compared != ""]
            if compared.nunique() > 1:
                varying.append(name)
        for names in (usual, [*texts]):
            if texts[varying].duplicated().any() or (not varying and len(texts) > 1):
                for _, alike in texts.groupby(varying or (lambda _: 0)):
                    differ = [name for name in names if alike[name].nunique() > 1]
                    varying += [name for name in differ if name not in varying]
        return _ranked(varying) or ["pruner", "permutation"]

    def _take_method(self) -> None:
        """Show the column `method` instead of the settings of methods, if the rows then differ."""
        groups = {"pruner", "temperature", "block_size", *METHODS}
        rest = ["method", *(name for name in self.settings if name.split(".")[0] not in groups)]
        typed = self.frame.groupby("row")["method"].agg(set)
        named = all(len(methods) == 1 and "" not in methods for methods in typed)
        if len(self.rows) > 1 and named and not self.labels[rest].duplicated().any():
            self.settings = rest

    def _starts(self) -> dict[int, int]:
        """Return the unpermuted row for each row's gap, if possible with the same statistics."""
        firsts = {row: self.first(row) for row in self.labels.index}
        if self.baseline is not None:
            model = _model(firsts[self.baseline])
            return {row: self.baseline for row, run in firsts.items() if _model(run) == model}
        beside = {}
        for row, run in firsts.items():
            of_methods = (name for name in run.identity if {name, name.split(".")[0]} & _OF_METHODS)
            beside[row] = run.key("seed", *of_methods)
        unpermuted = [row for row, run in firsts.items() if run.methods == "none"]
        starts = {}
        for row in firsts:
            like = [start for start in unpermuted if beside[start] == beside[row]]
            statistics = self.label(row, _STATISTICS)
            same = [start for start in like if self.label(start, _STATISTICS) == statistics]
            if like:
                starts[row] = row if row in like else (same or like)[0]
        return starts

    def _close_gaps(self) -> list[str]:
        """Add the measures `gap closed`, the mean over texts and one for each; return notes."""
        perplexities = [name for name in self.measures if self.kinds[name] == "perplexity"]
        closed = pd.DataFrame(math.nan, self.frame.index, perplexities)
        for row, start in self.starts.items():
            permuted = self.seeds(row, perplexities)
            unpermuted = self.seeds(start, perplexities)
            dense = self.seeds(start, [f"{DENSE}{name}" for name in perplexities])
            dense = dense.set_axis(perplexities, axis=1)
            closed.loc[self.rows[row]] = gap_closed(permuted, unpermuted, dense).to_numpy()
        closed = closed.dropna(axis=1, how="all")
        if closed.empty:
            return []
        common = closed.columns[closed.dropna(how="all").notna().all()]
        self.gaps = {}
        for ending in ("", FP8):
            names = [name for name in common if name.endswith(FP8) == bool(ending)]
            # A text with two window lengths counts once.
            shared = [*{name.partition(_PERPLEXITY)[0]: name for name in names}.values()]
            if shared:
                self.gaps[GAP + ending] = shared
        notes = []
        if len(closed.columns) > 1:
            notes = [f"{gap}: the mean over {', '.join(of)}" for gap, of in self.gaps.items()]
            notes = notes or [f"{GAP}: no text is in all rows, so that there is no mean over texts"]
            self.gaps |= {name.replace(_PERPLEXITY, f" {GAP} (", 1): [name] for name in closed}
        if not self.one_start():
            names = self.names()
            rows = Counter(names[start] for start in self.starts.values())
            measured = "; ".join(f"'{name}' (rows: {count})" for name, count in rows.items())
            notes.append(
                f"{GAP}: measured from {measured}; --baseline NAME=VALUE,... measures every row of "
                "its model from one row"
            )
        for gap, names in self.gaps.items():
            self.frame[gap] = closed[names].mean(axis=1, skipna=False)
            self.kinds[gap] = "share"
        last = self.measures.index(closed.columns[-1]) + 1
        self.measures[last:last] = [*self.gaps]
        return notes

    def _shared_dense(self) -> dict[str, tuple[float, float | None]]:
        shared = {}
        for name in self.kinds:
            values = self.frame.get(f"{DENSE}{name}")
            first = self.values[0].get(f"{DENSE}{name}")
            # Machines differ in the order of sums.
            if first and np.isclose(values, first.value, rtol=1e-4, atol=0).all():
                shared[name] = (first.value, first.stderr)
        return shared

    def find(self, text: str, option: str) -> int:
        """Return the only row with the settings `name=value,name=value` of an option."""
        # A value may be a list, so that only a comma before a name separates settings.
        wanted = dict(part.partition("=")[::2] for part in re.split(r",(?=[\w.]+=)", text))
        rows = [*self.labels.index]
        for name, value in wanted.items():
            present = [label for label in self.labels.get(name, pd.Series()).unique() if label]
            if value not in present:
                reason = f"no row has {name}={value}" if present else f"{name} is no column"
                valid = ", ".join(present or self.settings)
                raise ConfigError(f"{option} {text}: {reason}; valid are {valid}")
            rows = [row for row in rows if self.label(row, name) == value]
        if len(rows) != 1:
            differ = self.labels.loc[rows, self.settings].nunique() > 1
            ending = f"; they differ in {', '.join(differ.index[differ])}: add one" if rows else ""
            raise ConfigError(f"{option} {text}: {len(rows)} rows have these settings{ending}")
        return rows[0]

    def label(self, row: int, name: str) -> str:
        """Return the text of a row's setting; empty: the row has no such setting."""
        return str(self.labels.at[row, name]) if name in self.labels else ""

    def first(self, row: int) -> Run:
        """Return the first run of a row."""
        return self.runs[self.rows[row][0]]

    def seeds(self, row: int, names: list[str]) -> pd.DataFrame:
        """Return measures of a row's runs by seed; NaN: the run lacks the measure."""
        frame = self.frame.reindex(columns=["seed", *names]).loc[self.rows[row]]
        return frame.set_index("seed").astype(float)

    def has(self, row: int, name: str) -> bool:
        """Tell if all runs of a row have a measure."""
        return not math.isnan(self.means.at[row, name])

    def error(self, row: int, name: str) -> float | None:
        """Return the deviation over a row's seeds, or the standard error of a single run."""
        if len(self.rows[row]) > 1:
            return float(self.deviations.at[row, name])
        measure = self.values[self.rows[row][0]].get(name)
        return measure.stderr if measure else None

    def shown(self, row: int, name: str) -> str:
        """Return the text of a measure's mean and error; empty: the row lacks the measure."""
        if not self.has(row, name):
            return ""
        return number(self.means.at[row, name], self.kinds[name], self.error(row, name))

    def shown_dense(self, name: str) -> str:
        """Return the text of the value of the dense model; empty: the rows do not share one."""
        if name not in self.dense:
            return ""
        mean, error = self.dense[name]
        return number(mean, self.kinds[name], error)

    def limited(self, name: str) -> bool:
        """Tell if an accuracy was measured on only a part of the items in some run."""
        return self.kinds[name] in ("accuracy", "number") and any(
            run[name].limited for run in self.values if name in run
        )

    def heading(self, name: str) -> str:
        """Return the heading of a measure's column, with `(limited)` if it is limited."""
        return f"{name} (limited)" if self.limited(name) else name

    def show(self, columns: str | None, measures: str | None) -> None:
        """Choose the columns to show; None: the usual columns.

        Args:
            columns: settings, separated by commas.
            measures: measures, or parts of the names of several, separated by ", ".

        Raises:
            ConfigError: no setting or no measure fits.
        """
        if columns:
            self.settings = _ranked(name for name in self.labels if name in columns.split(","))
            if not self.settings:
                raise ConfigError(
                    f"--columns {columns}: expected settings, such as {', '.join(self._varying())}"
                )
        if measures:
            every = [*self.measures, *(name for name in self.kinds if name not in self.measures)]
            wanted: set[str] = set()
            for part in measures.split(", "):
                usual = [name for name in self.measures if part in name]
                others = [name for name in every if part in name]
                wanted |= {part} if part in every else {*(usual or others)}
            if not wanted:
                raise ConfigError(
                    f"--measures {measures}: expected names, or parts, of {', '.join(self.kinds)}"
                )
            self.measures = [name for name in every if name in wanted]

    def main(self) -> str | None:
        """Return the measure by which rows are compared; None: there is none.

        The first of these that all rows have: mean gap over several texts, if all gaps have one
        start; perplexity; average accuracy; other accuracy.
        """
        perplexities = [name for name in self.measures if self.kinds[name] == "perplexity"]
        accuracies = [name for name in self.measures if self.kinds[name] == "accuracy"]
        accuracies.sort(key=lambda name: not name.startswith("average acc"))
        shared = [name for name in self.means if self.means[name].notna().all()]
        if GAP in self.measures and len({*perplexities} & {*shared}) > 1 and self.one_start():
            return GAP
        every = [*perplexities, *accuracies]
        return next((name for name in every if name in shared), every[0] if every else None)

    def one_start(self) -> bool:
        """Tell if the gaps of all rows with one model and one pattern are measured from one row."""
        starts = {
            (_model(self.first(row)), self.label(row, "sparsity"), start)
            for row, start in self.starts.items()
        }
        return not self.gaps or len(starts) == len({start[:2] for start in starts})

    def names(self) -> list[str]:
        """Return a short name for each row, with its methods and the other settings shown."""
        names = []
        for row in self.labels.index:
            parts = []
            for name in self.settings:
                value = self.label(row, name)
                short = name.rpartition(".")[2]
                if name in ("method", "model", "sparsity", "pruner", "permutation"):
                    parts.append(value)
                elif value and value != METHODS.get(name):
                    parts.append(value if name in METHODS else f"{short}={value}")
            names.append(", ".join(parts) or self.first(row).metrics["name"])
        return names


def gap_closed(permuted: pd.DataFrame, start: pd.DataFrame, dense: pd.DataFrame) -> pd.DataFrame:
    """Return the gap closed of each run: `(ln start - ln permuted) / (ln start - ln dense)`.

    `ln start` and `ln dense` are means over all seeds of the unpermuted row, so that each run is
    measured from one number for each text, whatever its seed. The gap is NaN if a perplexity is not
    finite, or if the unpermuted model is as good as the dense one.

    Args:
        permuted: perplexities of the runs, seeds by texts.
        start: perplexities of the unpermuted row, seeds by texts.
        dense: perplexities of the dense model in the runs of the unpermuted row, seeds by texts.
    """
    base = np.log(start).mean(skipna=False)
    whole = base - np.log(dense).mean(skipna=False)
    closed = (base - np.log(permuted)) / whole.where((whole > 0) & np.isfinite(whole))
    closed.loc[:, ~np.isfinite(closed).all()] = math.nan
    return closed


def _model(run: Run) -> str:
    return run.key(*(name for name in run.identity if not _OF_MODEL.match(name)))


def _ranked(names: Iterable[str]) -> list[str]:
    places = {name: place for place, name in enumerate(_FIRST)}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))


def _is_spare(name: str) -> bool:
    """Tell if a setting is redundant."""
    return not _SPARE.isdisjoint(name.split("."))


def _sort_key(text: str) -> tuple[int, float, str]:
    """Return the sort key of a setting's text: `none` first, then numbers, then words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (-1, 0.0, "") if text == "none" else (1, 0.0, text)
