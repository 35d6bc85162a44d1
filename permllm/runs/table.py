"""One table of many runs: a frame with one row a run, and rows of runs that differ only in their seed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from permllm.errors import ConfigError
from permllm.runs.figures import pruning_minutes
from permllm.runs.measures import Measure, column_names, plain
from permllm.runs.read import Run

GAP = "gap closed"
ZEROS = "zeros"
DENSE = "dense: "
_PERPLEXITY = " perplexity ("
# Settings that change numbers by rounding alone, and those that files have digests of.
_ROUNDING = ("name", "save_weights", "model.device", "calibration.batch_size", "micro_batch_size", "activation_checkpointing")
_SPARE = ("name", "save_weights", "_target_", "path", "data_files", "architecture", "device", "hub_name", "source", "revision")
# Groups of methods by their option that does nothing, and settings that come with them.
METHODS = {"permutation": "none", "mask": "pruner", "reconstruction": "none"}
_OF_METHODS = (*METHODS, "temperature", "block_size", "seed", "calibration.statistics", "inputs.permutation.path")
# Columns that stand first.
_FIRST = ["model", "sparsity", "pruner", "permutation", "permutation.constraint", "mask", "reconstruction", "temperature"]
_FIRST += ["block_size"]


class Table:
    """Runs beside each other.

    Attributes:
        runs: the runs.
        frame: a row a run: settings as they are typed, `seed`, `method`, measures of the sparse model, measures of the dense
            model after `dense: `, `minutes`, `directory`, and `row`, the number of its row.
        rows: for each row the numbers of its runs, which differ only in their seed.
        settings: columns of settings that are shown.
        measures: columns of measures that are shown.
        kinds: kind of each measure.
        means: mean over the seeds of each row: rows by measures; not a number where a run lacks the measure.
        deviations: standard deviation over the seeds, likewise.
        dense: value and standard error of each measure of the dense model that all runs share.
        starts: for each row that has a gap closed the row from which it is measured.
        notes: lines for the reader.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self.notes = runs, []
        self._values, self.kinds, hidden = _values(runs)
        self.frame = _frame(runs, self._values)
        self.rows = _rows(runs)
        self._texts = pd.DataFrame([_texts(run) for run in runs]).fillna("")
        self.settings = self._varying()
        self._labels = (
            self._texts.assign(method=self.frame["method"]).iloc[[members[0] for members in self.rows]].reset_index(drop=True)
        )
        order = sorted(range(len(self.rows)), key=lambda row: [_sortable(self.label(row, name)) for name in self.settings])
        self.rows = [self.rows[row] for row in order]
        self._labels = self._labels.iloc[order].reset_index(drop=True)
        self.frame["row"] = pd.Series({run: row for row, members in enumerate(self.rows) for run in members})
        self.measures = [name for name in self.kinds if name not in hidden]
        self._take_method()
        self.dense = self._shared_dense()
        self._summarise()
        if not self._patterns_differ():
            self.measures.remove(ZEROS)
            del self.kinds[ZEROS]
        self._note()
        self.close_gaps()

    def close_gaps(self, baseline: int | None = None) -> None:
        """Add the measure `gap closed` (`gap_closed`): of several texts the mean, and a measure of each text.

        Args:
            baseline: row from which all rows of its model are measured; None: each from the row with the same settings but
                `permutation=none`, `mask=pruner` and `reconstruction=none`.
        """
        self.frame = self.frame.drop(columns=[name for name in self.frame if GAP in str(name)])
        self.measures = [name for name in self.measures if GAP not in name]
        self.notes = [note for note in self.notes if not note.startswith(GAP)]
        self.starts, self.gaps = {}, {}
        found: dict[str, pd.Series] = {}
        for row, members in enumerate(self.rows):
            start = self._start(row, baseline)
            if start is None:
                continue
            for name in self.measures:
                if self.kinds[name] != "perplexity":
                    continue
                here, from_, end = self.seeds(row, name), self.seeds(start, name), self.seeds(row, f"{DENSE}{name}")
                closed = gap_closed(here, from_, end)
                if closed.notna().all():
                    found.setdefault(name, pd.Series(np.nan, self.frame.index))[members] = closed.to_numpy()
                    self.starts[row] = start
        texts = [name for name in self.measures if name in found]
        measured = [run for row in self.starts for run in self.rows[row]]
        common = [name for name in texts if found[name][measured].notna().all()]
        # A text that was measured in two ways counts once.
        shared = list({name.partition(_PERPLEXITY)[0]: name for name in common}.values())
        self.gaps = {gap_of(name): [name] for name in texts} if len(texts) > 1 else {}
        self.gaps = ({GAP: shared} if shared else {}) | self.gaps
        for gap, names in self.gaps.items():
            self.frame[gap] = pd.concat([found[name] for name in names], axis=1).mean(axis=1, skipna=False)
            self.kinds[gap] = "share"
        if texts:
            last = self.measures.index(texts[-1]) + 1
            self.measures[last:last] = list(self.gaps)
            self._note_gaps(shared, len(texts) > 1, baseline)
        self._summarise()

    def label(self, row: int, name: str) -> str:
        """Return the value of a setting of a row as it is typed; empty where the row has no such setting."""
        return str(self._labels.at[row, name]) if name in self._labels else ""

    def labels(self, row: int) -> dict[str, str]:
        """Return the values of the settings that are shown."""
        return {name: self.label(row, name) for name in self.settings}

    def config(self, row: int) -> dict[str, Any]:
        """Return the settings of the first run of a row."""
        return self.runs[self.rows[row][0]].config

    def seeds(self, row: int, name: str) -> pd.Series:
        """Return a measure of each run of a row by its seed."""
        values = self.frame[name] if name in self.frame else pd.Series(np.nan, self.frame.index)
        return pd.Series(values[self.rows[row]].to_numpy(dtype=float), self.frame["seed"][self.rows[row]].to_numpy())

    def value(self, run: int, name: str) -> Measure | None:
        """Return a measure of a run with what belongs to it; `name` as in `frame`."""
        return self._values[run].get(name)

    def has(self, row: int, name: str) -> bool:
        """Tell whether all runs of a row have a measure."""
        return name in self.means and not math.isnan(self.means.at[row, name])

    def stderr(self, row: int, name: str) -> float | None:
        """Return the standard error of the only run of a row; None of several runs and where it is not known."""
        members = self.rows[row]
        value = self.value(members[0], name) if len(members) == 1 else None
        return value.stderr if value else None

    def shown(self, row: int, name: str) -> str:
        """Return the mean with the deviation over seeds, or with the standard error of a single run; empty for nothing."""
        if not self.has(row, name):
            return ""
        deviation = self.deviations.at[row, name] if len(self.rows[row]) > 1 else self.stderr(row, name)
        return with_error(self.means.at[row, name], deviation, self.kinds[name])

    def shown_dense(self, name: str) -> str:
        """Return the value of the dense model that all rows share; empty for none."""
        return with_error(*self.dense[name], self.kinds[name]) if name in self.dense else ""

    def limited(self, name: str) -> bool:
        """Tell whether some value of an accuracy is of a part of the items."""
        values = [value for run in range(len(self.runs)) if (value := self.value(run, name))]
        return self.kinds[name] in ("accuracy", "number") and any(value.limited for value in values)

    def heading(self, name: str) -> str:
        """Return a measure's name, with a word where it is of a part of the items."""
        return f"{name} (limited)" if self.limited(name) else name

    def show(self, columns: str | None, measures: str | None) -> None:
        """Show some settings and measures alone.

        Args:
            columns: names of settings, with commas; None: those that vary.
            measures: with ", " between them, each the name of a measure or a part of the names of several; None: all but those
                that only `asked_for` names.
        """
        if columns:
            self.settings = [name for name in self._ranked(self._labels.columns) if name in columns.split(",")]
            if not self.settings:
                raise ConfigError(f"--columns {columns}: expected settings, such as {', '.join(self._varying())}")
        if measures:
            hidden = [name for name in self.kinds if name not in self.measures]
            chosen: list[str] = []
            for part in measures.split(", "):
                found = [name for name in self.measures if part in name] or [name for name in hidden if part in name]
                chosen += [part] if part in self.kinds else found
            if not chosen:
                raise ConfigError(f"--measures {measures}: expected names or parts of names of {', '.join(self.kinds)}")
            self.measures = [name for name in [*self.measures, *hidden] if name in chosen]

    def main(self) -> str | None:
        """Return the measure that rows are compared by.

        The perplexity that all rows have; of several their mean gap, if all gaps have one start. Otherwise the average accuracy,
        otherwise the first accuracy; where rows share nothing, the first perplexity or accuracy.
        """
        every = {name: self.kinds[name] for name in self.measures}
        shared = [name for name, kind in every.items() if kind == "perplexity" and self.means[name].notna().all()]
        accuracies = [name for name, kind in every.items() if kind == "accuracy"]
        accuracies.sort(key=lambda name: not name.startswith("average acc"))
        first = [GAP] * (len(shared) > 1 and GAP in every and self.one_start()) + shared
        first += [name for name in accuracies if self.means[name].notna().all()]
        others = [name for name, kind in every.items() if kind == "perplexity"] + accuracies
        return next(iter([*first, *others]), None)

    def one_start(self) -> bool:
        """Tell whether the gaps of all rows of a model and a pattern are measured from one row."""
        starts: dict[Any, set[int]] = {}
        for row, start in self.starts.items():
            starts.setdefault((self._model(row), self.label(row, "sparsity")), set()).add(start)
        return all(len(rows) == 1 for rows in starts.values())

    def names(self) -> list[str]:
        """Return a short name for each row: its method, and what is unusual in it."""
        few = len(self.settings) <= 3
        # A name that is cut short can spare the calibration.
        settings = sorted(self.settings, key=lambda name: name.startswith("calibration."))
        names = []
        for row in range(len(self.rows)):
            parts = []
            for name in settings:
                value, group = self.label(row, name), name.partition(".")[0]
                alike = [
                    other
                    for other in range(len(self.rows))
                    if name == group or self.label(other, group) == self.label(row, group)
                ]
                usual = Counter(self.label(other, name) for other in alike).most_common(1)[0][0]
                if name in ("method", "model", "sparsity", "pruner", "permutation", "mask", "reconstruction"):
                    parts.append("" if name in ("mask", "reconstruction") and value == METHODS[name] else value)
                elif value and (few or value != usual):
                    parts.append(f"{'.'.join(name.removeprefix('permutation.').split('.')[-2:])}={value}")
            names.append(", ".join(filter(None, parts)) or self.runs[self.rows[row][0]].metrics["name"])
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

    def _summarise(self) -> None:
        names = [name for name in self.frame if name in self.kinds]
        grouped = self.frame.groupby("row")[names]
        whole = grouped.count().eq(grouped.size(), axis=0)
        self.means, self.deviations = grouped.mean().where(whole), grouped.std().where(whole)

    def _varying(self) -> list[str]:
        """Return settings that have several values in the rows, and others where these do not tell two rows apart."""
        texts = self._texts.iloc[[members[0] for members in self.rows]]
        usual = [name for name in texts if not _spare(name)]
        given = {name: texts[name][texts[name] != ""] for name in texts}
        varying = [name for name in usual if given[name].nunique() > 1]
        for names in (usual, list(texts)):
            if texts[varying].duplicated().any():
                for _, alike in texts.groupby(varying or (lambda _: 0)):
                    varying += [name for name in names if name not in varying and alike[name].nunique() > 1]
        # A table always tells which linears have another pattern.
        differ = [name for name in usual if name.split(".")[0] in ("keep_dense", "sparsity_of") and texts[name].nunique() > 1]
        varying += [name for name in differ if name not in varying]
        return self._ranked(varying or ["pruner", "permutation"])

    @staticmethod
    def _ranked(names: Iterable[str]) -> list[str]:
        rank = {name: number for number, name in enumerate(_FIRST)}
        return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))

    def _take_method(self) -> None:
        """Show the column `method` in place of the settings of methods, where it tells the rows apart."""
        of_row = self.frame.groupby("row")["method"]
        if len(self.rows) < 2 or (of_row.nunique() != 1).any() or (self.frame["method"] == "").any():
            return
        groups = {"pruner", "temperature", "block_size", *METHODS}
        rest = ["method", *(name for name in self.settings if name.split(".")[0] not in groups)]
        if not self._labels[rest].duplicated().any():
            self.settings = rest

    def _shared_dense(self) -> dict[str, tuple[float, float | None]]:
        found = {}
        for name in self.measures:
            values = self.frame.get(f"{DENSE}{name}")
            # Machines sum up in other orders.
            if values is not None and np.isclose(values, values.iloc[0], rtol=1e-4, atol=0).all():
                first = self.value(0, f"{DENSE}{name}")
                found[name] = (float(values.iloc[0]), first.stderr if first else None)
        return found

    def _patterns_differ(self) -> bool:
        asked = [
            [self.config(row).get(key) or None for key in ("sparsity", "keep_dense", "sparsity_of")]
            for row in range(len(self.rows))
        ]
        zeros = {f"{value:.2%}" for value in self.means[ZEROS]}
        return len(zeros) > 1 or any(one != asked[0] for one in asked)

    def _model(self, row: int) -> str:
        config = self.config(row)
        facts = {key: config["model"].get(key) for key in ("name", "hub_name", "revision", "architecture")}
        return json.dumps([facts, (config.get("inputs") or {}).get("model.path")], sort_keys=True)

    def _start(self, row: int, baseline: int | None) -> int | None:
        """Return the row from which a row's gap is measured."""
        if baseline is not None:
            return baseline if self._model(baseline) == self._model(row) else None
        ours = self._beside_methods(row)
        rows = [other for other in range(len(self.rows)) if self._unpermuted(other) and self._beside_methods(other) == ours]
        alike = [other for other in rows if self._statistics(other) == self._statistics(row)]
        return row if row in rows else next(iter([*alike, *rows]), None)

    def _statistics(self, row: int) -> Any:
        return self.config(row)["calibration"].get("statistics")

    def _unpermuted(self, row: int) -> bool:
        return all((self.config(row).get(group) or {}).get("name", usual) == usual for group, usual in METHODS.items())

    def _beside_methods(self, row: int) -> dict[str, Any]:
        flat = self.runs[self.rows[row][0]].identity
        return {key: v for key, v in flat.items() if not {key, key.split(".")[0]} & {*_OF_METHODS} and not _rounding(key)}

    def _note(self) -> None:
        for row in range(len(self.rows)):
            where = ", ".join(filter(None, self.labels(row).values()))
            formats = {str(self.runs[run].metrics.get("compute_dtype")) for run in self.rows[row]}
            if len(formats) > 1:
                self.notes.append(f"{where}: products of the seeds are in {' and '.join(sorted(formats))}")
            some = self.frame[self.measures].iloc[self.rows[row]].notna()
            missing = [name for name in self.measures if some[name].any() and not some[name].all()]
            if missing:
                self.notes.append(f"{', '.join(missing)}: left out of {where}: some of its {len(some)} seeds lack it")
        perplexities = [name for name in self.measures if self.kinds[name] == "perplexity"]
        if lacking := [name for name in perplexities if self.means[name].isna().any()]:
            self.notes.append(f"some rows lack {', '.join(lacking)}")

    def _note_gaps(self, shared: list[str], several: bool, baseline: int | None) -> None:
        if several:
            mean = f"the mean over {', '.join(shared)}" if shared else "no text is in all rows, so that each stands alone"
            self.notes.append(f"{GAP}: {mean}")
        pruners = {self.label(row, "pruner") for row in self.starts}
        if len(pruners) > 1 and baseline is None:
            self.notes.append(
                f"{GAP}: measured from each pruner's own model without a permutation, so that those of "
                f"{' and '.join(sorted(pruners))} do not compare; --baseline names one row for all"
            )
        seeds = [{self.runs[run].config["seed"] for run in members} for members in self.rows]
        others = [row for row, start in self.starts.items() if seeds[row].isdisjoint(seeds[start])]
        if others:
            names = "; ".join(", ".join(filter(None, self.labels(row).values())) for row in others)
            self.notes.append(f"{GAP}: measured from a baseline of other seeds: {names}")


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
    return closed.where(np.isfinite(closed))


def gap_of(name: str) -> str:
    """Return the measure of the gap on one text alone, by the name of the perplexity."""
    return name.replace(_PERPLEXITY, f" {GAP} (", 1)


def frame_of(runs: list[Run]) -> pd.DataFrame:
    """Return the frame of some runs (`permllm.runs.frame`)."""
    return _frame(runs, _values(runs)[0])


def _values(runs: list[Run]) -> tuple[list[dict[str, Measure]], dict[str, str], set[str]]:
    """Return the measures of each run by column, the kind of each column, and the columns that only `--measures` shows."""
    named = column_names([key for run in runs for key in (*run.sparse, *run.dense)])
    sparse = [{named[key]: measure for key, measure in run.sparse.items()} for run in runs]
    dense = [{f"{DENSE}{named[key]}": measure for key, measure in run.dense.items()} for run in runs]
    measures = {name: measure for values in sparse for name, measure in values.items()}
    order = dict.fromkeys(name for values in sparse for name in values)
    hidden = {name for name, measure in measures.items() if measure.asked_for}
    return [a | b for a, b in zip(sparse, dense, strict=True)], {name: measures[name].kind for name in order}, hidden


def _frame(runs: list[Run], values: list[dict[str, Measure]]) -> pd.DataFrame:
    lines = []
    for run, measures in zip(runs, values, strict=True):
        settings = {_typed(key): value for key, value in run.identity.items() if not _spare(key) and key != "seed"}
        line = settings | _digests(run) | {"seed": run.config["seed"], "method": str(run.config.get("method") or "")}
        line |= {name: measure.value for name, measure in measures.items()}
        line |= {"minutes": pruning_minutes(run.metrics["seconds"]), "directory": str(run.directory)}
        lines.append(line)
    return pd.DataFrame(lines)


def _texts(run: Run) -> dict[str, str]:
    """Return all settings that make a result as they are typed."""
    flat = {_typed(key): value for key, value in run.identity.items() if key != "seed" and not key.startswith("inputs.")}
    return {key: setting_text(value) for key, value in (flat | _digests(run)).items()}


def _digests(run: Run) -> dict[str, str]:
    inputs = run.config.get("inputs") or {}
    return {f"{plain(key)} (digest)": digest[:8] for key, digest in inputs.items() if digest}


def _typed(key: str) -> str:
    return plain(key.removesuffix(".name"))


def _rows(runs: list[Run]) -> list[list[int]]:
    """Return the runs of each row: runs of equal settings, but for the seed and settings of rounding.

    Settings of rounding tell two runs of one seed apart, so that no seed counts twice.
    """
    rows: list[list[int]] = []
    for members in _grouped(runs, range(len(runs)), rounding=False):
        seeds = {runs[run].config["seed"] for run in members}
        rows += [members] if len(seeds) == len(members) else _grouped(runs, members, rounding=True)
    return rows


def _grouped(runs: list[Run], members: Iterable[int], rounding: bool) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for run in members:
        flat = {k: v for k, v in runs[run].identity.items() if k != "seed" and (rounding or not _rounding(k))}
        found.setdefault(json.dumps(flat, sort_keys=True, default=str), []).append(run)
    return list(found.values())


def _rounding(key: str) -> bool:
    return key in _ROUNDING or key.rpartition(".")[2] in _ROUNDING[-2:]


def _spare(key: str) -> bool:
    """Tell whether a setting says nothing that others do not say."""
    return key in _SPARE[:2] or key.split(".")[0] == "inputs" or any(part in _SPARE[2:] for part in key.split("."))


def with_error(value: float, error: float | None, kind: str) -> str:
    """Return a number with its deviation or standard error as it is shown."""
    return number(value, kind) + ("" if error is None else f" ± {number(error, kind)}")


def number(value: float, kind: str) -> str:
    """Return a number of a kind of measure as it is shown."""
    formats = {"accuracy": ".2%", "share": ".2%", "error": ".4f", "number": ".4g", "seconds": ".0f"}
    return f"{value:{formats.get(kind, '.2f')}}"


def setting_text(value: Any) -> str:
    """Return a setting's value as YAML has it, in one line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return plain(str(value))


def _sortable(text: str) -> tuple[int, float, str]:
    if text == "none":  # the others are compared with it
        return (-1, 0.0, "")
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def method_of(config: Mapping[str, Any]) -> str:
    """Return the names of the permutation, mask and reconstruction of a run, those that do nothing left out."""
    others = [((config.get(group) or {}).get("name", usual), usual) for group, usual in METHODS.items()][1:]
    return ", ".join([str(config["permutation"]["name"]), *(str(name) for name, usual in others if name != usual)])


def summarise(runs: list[Run]) -> Table:
    """Return the table of some runs."""
    return Table(runs)
