"""One table of many runs: columns for what varies between them, rows of runs that differ only in their seed."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from permllm.config import digest_of, flatten, identity_of
from permllm.runs import evaluations
from permllm.runs.evaluations import counted_tasks, is_share, mean_accuracy, mean_error, task_label
from permllm.runs.figures import PRUNING_STAGES
from permllm.runs.read import Run

GAP = "gap closed"
ZEROS = "zeros"
_PERPLEXITY = " perplexity ("
# Machines sum up in other orders: numbers of one model that are so near are the same.
_NEAR = 1e-4

# What a run is called, what is kept of it, and how its work is laid out, which change its numbers by rounding alone.
_NO_RESULT = ("name", "save_weights", "model.device", "calibration.batch_size")
_NO_RESULT_BELOW = ("micro_batch_size", "activation_checkpointing")
# Settings that only repeat others or name files, whose digests stand beside them, and what says only what was kept.
_LEFT_OUT = ("seed", "inputs")
_LEFT_OUT_TOO = ("name", "save_weights")
_LEFT_OUT_BELOW = ("_target_", "path", "data_files", "architecture", "device", "hub_name", "source", "revision")
# What a reader looks for first.
_FIRST = (
    "model",
    "sparsity",
    "pruner",
    "permutation",
    "permutation.constraint",
    "mask",
    "reconstruction",
    "temperature",
    "block_size",
)

# Settings that a row's name always has; of the others it has those with an unusual value.
_NAMES_A_ROW = ("model", "sparsity", "pruner", "permutation")
# Groups that a row's name has where more than the order is learned, and what they are by themselves.
LEARNED_TOO = {"mask": "pruner", "reconstruction": "none"}


@dataclass(frozen=True)
class Scored:
    """What a number of one run is made of.

    Attributes:
        of: what was scored: runs are compared window by window, or item by item, where theirs is equal.
        values: nats of each window, or the score of each item.
        tokens: predicted ones of a window; 1 for items.
    """

    of: tuple[Any, ...]
    values: list[float]
    tokens: int = 1


@dataclass(frozen=True)
class Gap:
    """What a row closes of the log-perplexity on one text between the unpermuted model and the dense one.

    Attributes:
        here: the row's perplexity.
        start: the unpermuted model's.
        end: the dense model's.
        own: place in `start` of the value that has the seed of each run of the row; empty where not all seeds are the same.
    """

    here: Measure
    start: Measure
    end: Measure
    own: list[int]

    def shares(self) -> list[float] | None:
        """The share of each run of the row; their mean is `(ln p_start - ln p_here) / (ln p_start - ln p_end)`.

        In it the logarithms are means over seeds. A run's share is that of its distance from the unpermuted model of its seed,
        if there is one. None where a perplexity is not finite, or the unpermuted model as good as the dense one, or better.
        """
        start, end = mean_log(self.start), mean_log(self.end)
        if not math.isfinite(start) or not math.isfinite(end) or start <= end or not math.isfinite(mean_log(self.here)):
            return None
        starts = [math.log(self.start.values[place]) for place in self.own] or [start] * len(self.here.values)
        return [(own - math.log(value)) / (start - end) for own, value in zip(starts, self.here.values, strict=True)]


@dataclass
class Measure:
    """One number of a row.

    Attributes:
        values: of the runs, one a seed.
        kind: `perplexity`, `accuracy`, `share`, `error`, `seconds` (of finding the order and pruning), or `number`, a metric
            of a task that is none of these, of which may be better what is larger or what is smaller.
        stderr: standard error of a single run's accuracy.
        limited: it was measured on a part of the items.
        scored: of each run, what its value is made of, by text or task; nothing where that was not kept.
        gaps: of a gap, what it is the mean of, by the name of the perplexity.
    """

    values: list[float]
    kind: str
    stderr: float | None = None
    limited: bool = False
    scored: list[dict[str, Scored]] = field(default_factory=list, compare=False)
    gaps: dict[str, Gap] = field(default_factory=dict, compare=False)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(pd.Series(self.values, dtype=float).mean())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for a single one, not a number where a value is infinite."""
        if len(self.values) < 2:
            return None
        return float(pd.Series(self.values, dtype=float).std()) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def error(self) -> float:
        """What a picture shows around the mean: the deviation, or the standard error; zero where there is none."""
        error = self.deviation or self.stderr or 0.0
        return error if math.isfinite(error) else 0.0


@dataclass
class Row:
    """Runs that differ only in their seed.

    Attributes:
        labels: value of each column of settings.
        measures: of the sparse model, by name.
        runs: one a seed.
        dense: the dense model's measures, by name, one a seed.
    """

    labels: dict[str, str]
    measures: dict[str, Measure] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    dense: dict[str, Measure] = field(default_factory=dict)


@dataclass
class Summary:
    """The table.

    Attributes:
        settings: names of the columns of settings.
        measures: names of the columns of numbers.
        rows: in the order of their settings.
        dense: the dense model's measures, where all rows share them.
        notes: what a reader must know of it.
    """

    settings: list[str]
    measures: list[str]
    rows: list[Row]
    dense: dict[str, Measure]
    notes: list[str] = field(default_factory=list)


def summarise(runs: list[Run]) -> Summary:
    """Group runs by their settings without the seed, and find what varies."""
    members = _seeds_of_a_row(runs)
    groups = [flat_settings(runs[indices[0]].config) for indices in members]
    settings = _varying(groups)
    if len({json.dumps(_labels(values, settings)) for values in groups}) < len(groups):
        # What no column shows by itself must tell two rows apart where nothing else does.
        groups = [flat_settings(runs[indices[0]].config, everything=True) for indices in members]
        settings = _varying(groups)
    rows = [
        Row(_labels(values, settings), {}, [runs[i] for i in indices]) for values, indices in zip(groups, members, strict=True)
    ]
    notes = []
    each = {id(run): {which: _measures(run, which) for which in ("dense", "sparse")} for run in runs}
    named = _names(key for found in each.values() for measures in found.values() for key in measures)
    for row in rows:
        row.dense, _ = _shared_measures([each[id(run)]["dense"] for run in row.runs], named, of_dense=True)
        row.measures, missing = _shared_measures([each[id(run)]["sparse"] for run in row.runs], named)
        if missing:
            where = ", ".join(str(run.directory) for run in row.runs)
            notes.append(f"{', '.join(missing)}: left out of a row of {len(row.runs)} seeds, of which some lack it ({where})")
    ordered = sorted(rows, key=lambda row: [_sortable(row.labels[name]) for name in settings])
    names = list(dict.fromkeys(name for row in ordered for name in row.measures))
    summary = Summary(settings, names, ordered, _shared_dense(ordered), notes)
    if not _patterns_differ(ordered):
        summary.measures.remove(ZEROS)
        for row in ordered:
            del row.measures[ZEROS]
    _note_texts(summary)
    _note_formats(summary)
    close_gaps(summary)
    return summary


def _seeds_of_a_row(runs: list[Run]) -> list[list[int]]:
    """The places of the runs of each row.

    They are grouped by all settings that make a result, not by the columns alone: what no column shows must not be averaged
    away. What makes none tells runs apart where they are of one seed, so that no seed counts twice.
    """
    members = _grouped(runs, range(len(runs)), essential=True)
    rows = []
    for indices in members:
        seeds = [runs[index].config["seed"] for index in indices]
        rows += [indices] if len(set(seeds)) == len(seeds) else _grouped(runs, indices, essential=False)
    return rows


def _grouped(runs: list[Run], indices: Iterable[int], essential: bool) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for index in indices:
        found.setdefault(json.dumps(_without_seed(runs[index], essential), sort_keys=True), []).append(index)
    return list(found.values())


def _note_formats(summary: Summary) -> None:
    """Say where the seeds of a row were computed in several formats, as `compute_dtype=auto` takes them from the machine."""
    for row in summary.rows:
        formats = {str(run.metrics.get("compute_dtype")) for run in row.runs}
        if len(formats) > 1:
            where = ", ".join(filter(None, row.labels.values()))
            summary.notes.append(f"{where}: products of the seeds are in {' and '.join(sorted(formats))}")


def _shared_dense(rows: list[Row]) -> dict[str, Measure]:
    """The dense model's measures where those of all rows are the same to the digits that are shown."""
    found = {}
    for name, measure in rows[0].dense.items():
        means = [row.dense[name].mean for row in rows if name in row.dense]
        if len(means) == len(rows) and all(math.isclose(mean, means[0], rel_tol=_NEAR) for mean in means):
            alike = all(math.isclose(value, measure.values[0], rel_tol=_NEAR) for value in measure.values)
            found[name] = replace(measure, values=measure.values[:1], scored=measure.scored[:1]) if alike else measure
    return found


def frame_of(runs: list[Run]) -> pd.DataFrame:
    """`permllm.runs.frame` of some runs."""
    each = [{which: _measures(run, which) for which in ("sparse", "dense")} for run in runs]
    named = _names(key for found in each for measures in found.values() for key in measures)
    lines = []
    for run, found in zip(runs, each, strict=True):
        line = flat_settings(run.config) | {"seed": run.config["seed"]}
        for which, prefix in (("sparse", ""), ("dense", "dense: ")):
            line |= {f"{prefix}{named[key]}": measure.mean for key, measure in found[which].items()}
        lines.append(line | {"directory": str(run.directory)})
    return pd.DataFrame(lines)


def close_gaps(summary: Summary, baseline: Row | None = None) -> None:
    """Say in the measure `gap closed` how much of the log-perplexity between the unpermuted and the dense model goes.

    `(ln p_baseline - ln p_row) / (ln p_baseline - ln p_dense)`, of the means of the logarithms over seeds. Where there are
    several perplexities it is the mean over those that all rows with a baseline have, and each has a measure of its own beside
    it. Nothing where a row has no baseline, or that is as good as dense.

    Args:
        summary: of which the rows are.
        baseline: of all rows of its model; None is for each the row with the same settings but `permutation=none` and
            `reconstruction=none`.
    """
    _forget_gaps(summary)
    found: list[tuple[Row, dict[str, Gap]]] = []
    references: list[Row] = []
    settings = [_beside_the_order(row) for row in summary.rows]
    starts = [(row, flat) for row, flat in zip(summary.rows, settings, strict=True) if _unpermuted(row)]
    for row, ours in zip(summary.rows, settings, strict=True):
        own = [other for other, flat in starts if flat == ours]
        own.sort(key=lambda other: (other is not row, _statistics(other) != _statistics(row)))
        reference = next(iter(own), None) if baseline is None else baseline if _model(baseline) == _model(row) else None
        if reference is None:
            continue
        seeds, theirs = ([run.config["seed"] for run in one.runs] for one in (row, reference))
        places = [theirs.index(seed) for seed in seeds] if set(seeds) == set(theirs) else []
        gaps = {
            name: Gap(measure, reference.measures[name], row.dense[name], places)
            for name, measure in row.measures.items()
            if measure.kind == "perplexity" and name in reference.measures and name in row.dense
        }
        if gaps := {name: gap for name, gap in gaps.items() if gap.shares() is not None}:
            found.append((row, gaps))
            references.append(reference)
    texts = [name for name in summary.measures if any(name in gaps for _, gaps in found)]
    if not texts:
        return
    # Of a text that was measured in several ways the latest counts, which comes last, or the text would count twice.
    shared = list({_text_of(name): name for name in texts if all(name in gaps for _, gaps in found)}.values())
    for row, gaps in found:
        if shared:
            row.measures[GAP] = _mean_gap({name: gaps[name] for name in shared})
        if len(texts) > 1:
            row.measures |= {gap_of(name): _mean_gap({name: gap}) for name, gap in gaps.items()}
    summary.notes += _notes_on_starts([(row, start) for (row, _), start in zip(found, references, strict=True)])
    last = summary.measures.index(texts[-1]) + 1
    summary.measures[last:last] = [GAP] * bool(shared) + [gap_of(name) for name in texts] * (len(texts) > 1)
    if len(texts) > 1:
        mean = f"the mean over {', '.join(shared)}" if shared else "no text is in all rows, so that each stands alone"
        alone = [name for name in texts if name not in shared and any(name not in gaps for _, gaps in found)] if shared else []
        again = [name for name in texts if name not in (*shared, *alone)] if shared else []
        mean += f", without {', '.join(alone)}, which some rows lack" if alone else ""
        mean += f", without {', '.join(again)}, of a text that is in it already" if again else ""
        summary.notes.append(f"{GAP}: {mean}")


def one_start(summary: Summary) -> bool:
    """Whether the gaps of all rows of a model and a pattern begin at one row's perplexity, so that they compare."""
    starts: dict[Any, set[tuple[float, ...]]] = {}
    for row in summary.rows:
        for name, gap in row.measures[GAP].gaps.items() if GAP in row.measures else ():
            starts.setdefault((name, _model(row), row.runs[0].config["sparsity"]), set()).add(tuple(gap.start.values))
    return all(len(found) == 1 for found in starts.values())


def _notes_on_starts(found: list[tuple[Row, Row]]) -> list[str]:
    """What a reader must know of the baselines from which gaps are measured."""
    notes = []
    others = [row for row, start in found if _seeds(row).isdisjoint(_seeds(start))]
    if others:
        names = "; ".join(", ".join(filter(None, row.labels.values())) for row in others)
        notes.append(f"{GAP}: measured from a baseline of other seeds: {names}")
    pruners = {row.runs[0].config["pruner"]["name"] for _, row in found}
    if len(pruners) > 1:
        notes.append(
            f"{GAP}: measured from each pruner's own model without a permutation, so that those of "
            f"{' and '.join(sorted(pruners))} do not compare; --baseline names one row for all"
        )
    return notes


def _seeds(row: Row) -> set[Any]:
    return {run.config["seed"] for run in row.runs}


def gap_of(name: str) -> str:
    """The measure of the gap on one text alone, by the name of the perplexity."""
    return name.replace(_PERPLEXITY, f" {GAP} (", 1)


def _text_of(name: str) -> str:
    """What a perplexity is measured on, by its name: several texts of one name have their digests in it."""
    text, _, facts = name.partition(_PERPLEXITY)
    return f"{text} {facts.partition(_NO_TEXT)[2]}"


def _statistics(row: Row) -> Any:
    return (row.runs[0].config.get("calibration") or {}).get("statistics")


def _mean_gap(gaps: dict[str, Gap]) -> Measure:
    """One value a run, the mean over the texts."""
    shares = [gap.shares() or [] for gap in gaps.values()]
    return Measure([statistics.fmean(of_run) for of_run in zip(*shares, strict=True)], "share", gaps=gaps)


def _forget_gaps(summary: Summary) -> None:
    """Those from other baselines."""
    for row in summary.rows:
        row.measures = {name: measure for name, measure in row.measures.items() if not measure.gaps}
    summary.measures = [name for name in summary.measures if any(name in row.measures for row in summary.rows)]
    summary.notes = [note for note in summary.notes if not note.startswith(f"{GAP}: ")]


def _patterns_differ(rows: list[Row]) -> bool:
    """Whether not all rows were pruned to the same pattern in the same linears."""
    configs = [row.runs[0].config for row in rows]
    asked = [[config["sparsity"], config.get("keep_dense") or [], config.get("sparsity_of") or {}] for config in configs]
    zeros = [f"{row.measures[ZEROS].mean:.2%}" for row in rows]
    return any(pair != (asked[0], zeros[0]) for pair in zip(asked, zeros, strict=True))


def shared_perplexities(summary: Summary) -> list[str]:
    """The perplexities that every row has."""
    each = [{name for name, measure in row.measures.items() if measure.kind == "perplexity"} for row in summary.rows]
    return [name for name in summary.measures if all(name in names for names in each)]


def _note_texts(summary: Summary) -> None:
    """Say what rows are not compared by, as not all of them have it."""
    shared = shared_perplexities(summary)
    every = {name for row in summary.rows for name, measure in row.measures.items() if measure.kind == "perplexity"}
    alone = [name for name in summary.measures if name in every and name not in shared]
    if alone:
        by = f"rows are compared by {', '.join(shared)}" if shared else "no perplexity compares all rows"
        summary.notes.append(f"{by}: some rows lack {', '.join(alone)}")


def _model(row: Row) -> tuple[str, ...]:
    """What tells a model from another one of its name."""
    config = row.runs[0].config
    settings = {key: config["model"].get(key) for key in ("name", "hub_name", "revision", "architecture")}
    settings["files"] = (config.get("inputs") or {}).get("model.path")
    return tuple(json.dumps(value, sort_keys=True) for value in settings.values())


# Of a baseline's settings, what need not be those of the row: methods of order, mask and weights and what comes with them.
_OF_THE_ORDER = (
    "permutation",
    "temperature",
    "block_size",
    "mask",
    "reconstruction",
    "seed",
)
# A learned permutation has statistics of its own, and one that is read has its file.
_OF_THE_ORDER_TOO = ("calibration.statistics", "inputs.permutation.path")


def _beside_the_order(row: Row) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(identity_of(row.runs[0].config)).items()
        if key.split(".")[0] not in _OF_THE_ORDER and key not in _OF_THE_ORDER_TOO and not _makes_no_result(key)
    }


# By itself a mask is the pruner's.
_UNPERMUTED = {"permutation": ("none",), "mask": ("none", "pruner"), "reconstruction": ("none",)}


def _unpermuted(row: Row) -> bool:
    config = row.runs[0].config
    return all((config.get(group) or {}).get("name", "none") in names for group, names in _UNPERMUTED.items())


def mean_log(measure: Measure) -> float:
    """Mean of the logarithms of a measure's values, which are positive, over the seeds."""
    return statistics.fmean(map(math.log, measure.values))


def _without_seed(run: Run, essential: bool) -> dict[str, Any]:
    """The settings behind a run, without its seed; of the essential ones those alone that make a result."""
    flat = flatten(identity_of(run.config))
    return {key: value for key, value in flat.items() if key != "seed" and not (essential and _makes_no_result(key))}


def _makes_no_result(key: str) -> bool:
    return key in _NO_RESULT or key.rpartition(".")[2] in _NO_RESULT_BELOW


def row_labels(summary: Summary) -> list[str]:
    """A short name for each row: all settings where these are few, else the method and what is unusual in it."""
    labels = []
    few = len(summary.settings) <= 3
    # How it was calibrated comes last: it is what a name that is cut short can spare.
    settings = sorted(summary.settings, key=lambda name: name.startswith("calibration."))
    for row in summary.rows:
        parts = []
        for name in settings:
            value = row.labels[name]
            group, _, below = name.partition(".")
            # What is usual for an order that is learned says nothing about the heuristic one.
            rows = [other for other in summary.rows if not below or other.labels.get(group) == row.labels.get(group)]
            if name in _NAMES_A_ROW or name in LEARNED_TOO:
                parts.append(value if value != LEARNED_TOO.get(name) else "")
            elif value and (few or value != Counter(other.labels[name] for other in rows).most_common(1)[0][0]):
                parts.append(f"{'.'.join(name.removeprefix('permutation.').split('.')[-2:])}={value}")
        labels.append(", ".join(filter(None, parts)) or row.runs[0].metrics["name"])
    return labels


def flat_settings(config: dict[str, Any], everything: bool = False) -> dict[str, Any]:
    """Settings that make a result, dotted, as they are typed; a group's `name` stands under the group's own.

    Args:
        config: of a run.
        everything: those too that others say, such as the sizes of a model beside its name.
    """
    flat = flatten(identity_of(config))
    kept = {}
    for key, value in flat.items():
        spare = key in _LEFT_OUT_TOO or any(part in _LEFT_OUT_BELOW for part in key.split("."))
        if key.split(".")[0] in _LEFT_OUT or (spare and not everything):
            continue
        kept[plain(key.removesuffix(".name"))] = value
    inputs = config.get("inputs") or {}
    return kept | {f"{plain(key)} (digest)": digest[:8] for key, digest in inputs.items() if digest}


def _varying(groups: list[dict[str, Any]]) -> list[str]:
    """Settings that have several values; and, where these do not tell two groups apart, those that only some groups have."""
    names = dict.fromkeys(name for values in groups for name in values)
    varying = [name for name in names if len({setting_text(values[name]) for values in groups if name in values}) > 1]
    for index, values in enumerate(groups):
        for other in groups[:index]:
            if _labels(values, varying) == _labels(other, varying):
                varying += [name for name in names if name not in varying and values.get(name) != other.get(name)]
    # Which linears are pruned to what is always told, where it is not the same of all.
    varying += [
        name
        for name in names
        if name.split(".")[0] in ("keep_dense", "sparsity_of")
        and name not in varying
        and any(name not in values for values in groups)
    ]
    # What every run shares is still worth a column when nothing varies: the method.
    if not varying:
        varying = [name for name in ("pruner", "permutation") if name in names]
    rank = {name: position for position, name in enumerate(_FIRST)}
    return sorted(varying, key=lambda name: (rank.get(name, len(rank)), name))


def _labels(values: dict[str, Any], settings: list[str]) -> dict[str, str]:
    return {name: setting_text(values[name]) if name in values else "" for name in settings}


# The last fact of a perplexity is its text's digest, after this.
_NO_TEXT = "text "
# A measure's name, and facts of how it was measured, which its column names where two of that name differ in them.
_Key = tuple[str, tuple[str, ...]]


def _names(keys: Iterable[_Key]) -> dict[_Key, str]:
    """The column of each measure."""
    of_name: dict[str, list[tuple[str, ...]]] = {}
    for name, facts in dict.fromkeys(keys):
        of_name.setdefault(name, []).append(facts)
    named = {}
    for name, every in of_name.items():
        differs = [len(set(values)) > 1 for values in zip(*every, strict=True)]
        for facts in every:
            said = [fact for fact, differing in zip(facts, differs, strict=True) if differing]
            named[name, facts] = ", ".join([name, *said])
    return named


def _shared_measures(
    each: list[dict[_Key, Measure]], named: dict[_Key, str], of_dense: bool = False
) -> tuple[dict[str, Measure], list[str]]:
    """The measures that all runs of a row have, over their seeds, and the names of what some lack."""
    found, missing = {}, []
    for key in dict.fromkeys(key for measures in each for key in measures):
        if any(key not in measures for measures in each):
            missing.append(named[key])
            continue
        of_seeds = [measures[key] for measures in each]
        # A deviation over seeds says more, where there is one: the dense model is the same for all of them.
        one = len(each) == 1 or (of_dense and len({measure.mean for measure in of_seeds}) == 1)
        stderr = of_seeds[0].stderr if one else None
        values = [value for measure in of_seeds for value in measure.values]
        scored = [parts for measure in of_seeds for parts in measure.scored]
        found[named[key]] = Measure(values, of_seeds[0].kind, stderr, any(measure.limited for measure in of_seeds), scored)
    return found, missing


def _measures(run: Run, which: str) -> dict[_Key, Measure]:
    """Of one run, in all ways that it was evaluated in."""
    metrics = run.metrics
    found: dict[_Key, Measure] = {}
    for entry in evaluations.all_of(metrics):
        found = _evaluated(entry, which, run) | found
    if which == "sparse":
        for key, name, kind in (
            ("retained_saliency", "saliency retained", "share"),
            ("output_error", "output error", "error"),
        ):
            if key in metrics:
                found[name, ()] = Measure([_mean(metrics[key].values())], kind)
        found[ZEROS, ()] = Measure([metrics["sparsity"]["of_model"]], "share")
        # Loading, calibration and the dense model's evaluation may be what an earlier job left.
        seconds = sum(metrics["seconds"].get(stage, 0.0) for stage in PRUNING_STAGES if stage != "calibrate")
        found["seconds", ()] = Measure([seconds], "seconds")
    return found


def _evaluated(entry: Mapping[str, Any], which: str, run: Run) -> dict[_Key, Measure]:
    """Of one evaluation."""
    found: dict[_Key, Measure] = {}
    facts: tuple[str, ...]
    how = entry["evaluation"]
    scores = run.scores.get(digest_of(how), {})
    for text, values in entry.get("perplexity", {}).get(which, {}).items():
        window, text_digest = values["window"], evaluations.text_digest(entry, text)
        begins = "with BOS" if how.get("perplexity", {}).get("bos") else "without BOS"
        facts = (f"{values['tokens'] // max(1, window - 1)} windows", begins, f"{_NO_TEXT}{_short(text_digest)}")
        limited = how.get("perplexity", {}).get("limit") is not None
        losses = scores.get("perplexity", {}).get(which, {}).get(text, [])
        scored = _windows(losses, values, (_same_text(entry, text), run.metrics.get("model")))
        key = (f"{plain(text)}{_PERPLEXITY}window {window})", facts)
        found[key] = Measure([values["value"]], "perplexity", None, limited, [{text: scored} if scored else {}])
    tasks = entry.get("zero_shot", {}).get(which, {})
    bos = f"add_bos_token={setting_text(how.get('zero_shot', {}).get('add_bos_token'))}"
    scored_tasks = scores.get("zero_shot", {}).get(which, {})
    items = {task: _items(one, one["acc"], tasks[task]["acc"]) for task, one in scored_tasks.items() if task in tasks}
    for task, values in tasks.items():
        if values["acc"] is not None:
            one = items.get(task)
            facts = (f"{values['n']} items", f"split {plain(str(values['split']))}", bos)
            parts = [{task: one} if one else {}]
            found[f"{plain(task)} acc", facts] = Measure(
                [values["acc"]], "accuracy", values["stderr"], values["limited"], parts
            )
    for task, values in entry.get("tasks", {}).get(which, {}).items():
        for metric, value in values["metrics"].items():
            if value is not None:
                share = is_share(metric)
                facts = (f"{values['n']} items", f"split {plain(str(values['split']))}", *_how_asked(how, values))
                scored = scores.get("tasks", {}).get(which, {}).get(task)
                # What is no share need not be a mean over the items.
                one = _items(scored, scored["metrics"].get(metric, []), value) if scored and share else None
                kind, parts = "accuracy" if share else "number", [{task: one} if one else {}]
                found[plain(task_label(task, values, metric)), facts] = Measure(
                    [value], kind, values["stderr"].get(metric), values["limited"], parts
                )
    counted = counted_tasks(tasks)
    if len(counted) > 1:
        limited = any(tasks[task]["limited"] for task in counted)
        facts = (f"of {plain(', '.join(sorted(counted)))}", f"{sum(tasks[task]['n'] for task in counted)} items", bos)
        kept = {task: one for task in counted if (one := items.get(task))}
        parts = [kept if len(kept) == len(counted) else {}]
        found["average acc", facts] = Measure([mean_accuracy(tasks)], "accuracy", mean_error(tasks), limited, parts)
    return found


def _same_text(entry: Mapping[str, Any], text: str) -> tuple[str, ...]:
    """What is equal where two evaluations read the same text.

    That is its digest; of a file of the hub, whose commits change for other reasons too, its name and what the dense model
    makes of it, to three digits.
    """
    digest = evaluations.text_digest(entry, text)
    dense = entry["perplexity"].get("dense", {}).get(text)
    return (_short(digest), f"{dense['value']:.3g}") if "@" in digest and dense else (digest,)


def _short(text_digest: str) -> str:
    """What tells a text from another one of its name: some digits of a digest; of the hub repository and file, no commit."""
    repository, at, file = plain(text_digest).partition("@")
    return f"{repository}/{file.partition('/')[2]}" if at else repository[:8]


def _how_asked(how: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, str]:
    """How a task of `evaluation.tasks` was asked for; a group leaves results of several names."""
    asked = how.get("tasks", {})
    own = asked.get(values.get("asked")) or {}
    return f"add_bos_token={setting_text(own.get('add_bos_token'))}", f"file {str(own.get('digest', ''))[:8]}"


def _windows(losses: list[float], values: Mapping[str, Any], of: tuple[Any, ...]) -> Scored | None:
    """The windows of a perplexity; None where they were not kept, or are not those of this value."""
    tokens = values["window"] - 1
    if not losses or not tokens or len(losses) * tokens != values["tokens"] or not math.isfinite(values["value"]):
        return None
    # Scores are a file of their own, which somebody may have put there.
    if not math.isclose(_mean(losses) / tokens, math.log(values["value"]), rel_tol=1e-9, abs_tol=1e-9):
        return None
    return Scored((*of, values["window"], len(losses)), losses, tokens)


def _items(scored: Mapping[str, Any], scores: list[float], value: float | None) -> Scored | None:
    """The items of an accuracy; None where they are not those of this value."""
    if not scores or len(scores) != len(scored["items"]) or value is None:
        return None
    if not math.isclose(_mean(scores), value, rel_tol=1e-9, abs_tol=1e-9):
        return None
    return Scored((scored["digest"], tuple(scored["items"])), scores)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    try:
        return statistics.fmean(numbers)
    except OverflowError:
        return math.inf


def setting_text(value: Any) -> str:
    """A setting's value as YAML would have it, in one line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    word = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    return plain(word)


def plain(text: str) -> str:
    """A text of a record without what would break a line, or steer a terminal."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _sortable(text: str) -> tuple[int, float, str]:
    if text == "none":  # what the others are compared with
        return (-1, 0.0, "")
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)
