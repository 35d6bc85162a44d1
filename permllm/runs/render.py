"""A summary as Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pandas as pd

from permllm.config import finite
from permllm.errors import ConfigError
from permllm.runs.compare import Paired, change_between, paired
from permllm.runs.published import Comparison
from permllm.runs.table import GAP, Measure, Row, Summary, close_gaps, one_start, row_labels, shared_perplexities

FORMATS = ("md", "csv", "latex", "json")


def render(summary: Summary, format: str, baseline: Row | None = None, paper: Comparison | None = None) -> str:
    """The table as text.

    Args:
        summary: of the runs.
        format: one of `FORMATS`.
        baseline: a row whose perplexity, or average accuracy, the others' is compared with.
        paper: puts the published numbers beside ours.
    """
    if format == "json":
        return json.dumps(finite(records(summary, baseline, paper)), indent=2, allow_nan=False) + "\n"
    header, body = cells(summary, baseline, paper)
    return as_text(pd.DataFrame(body, columns=header), format, len(summary.settings))


def as_text(table: pd.DataFrame, format: str, texts: int = 0) -> str:
    """A table of texts.

    Args:
        table: cells as they are shown.
        format: `md`, `csv` or `latex`.
        texts: how many of the first columns hold words; the others are aligned to the right, in LaTeX.
    """
    if format == "csv":
        return str(table.to_csv(index=False, lineterminator="\n"))
    if format == "latex":
        columns = "l" * texts + "r" * (len(table.columns) - texts)
        return table.to_latex(index=False, escape=True, column_format=columns).replace("±", r"$\pm$")
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def records(summary: Summary, baseline: Row | None = None, paper: Comparison | None = None) -> list[dict[str, Any]]:
    """The rows as plain values; arguments as `render`."""
    return [_record(summary, row, baseline, paper) for row in summary.rows]


def cells(summary: Summary, baseline: Row | None = None, paper: Comparison | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table as they are shown; the dense model's row first, where all share it."""
    several = any(len(row.runs) > 1 for row in summary.rows)
    header = [*summary.settings, *(["seeds"] if several else [])]
    body = [
        [*(row.labels[name] for name in summary.settings), *([str(len(row.runs))] if several else [])] for row in summary.rows
    ]
    dense = ["dense", *[""] * (len(header) - 1)]
    main = main_measure(summary)
    for name in summary.measures:
        # The header of a file must not have a name twice.
        prefix = "" if name == main else f"{name}, "
        header.append(heading(summary, name))
        dense.append(shown(summary.dense[name]) if name in summary.dense else "")
        for row, line in zip(summary.rows, body, strict=True):
            line.append(shown(row.measures[name]) if name in row.measures else "")
        values = [paper.value(row, name) for row in summary.rows] if paper else []
        if paper and any(value is not None for value in values):
            header.append(prefix + paper.heading)
            of_dense = paper.dense(name)
            dense.append("" if of_dense is None else _number(of_dense, _kind(summary, name)))
            for value, line in zip(values, body, strict=True):
                line.append("" if value is None else _number(value, _kind(summary, name)))
            if paper.same_model:
                header.append(f"{prefix}difference")
                dense.append("")
                for row, value, line in zip(summary.rows, values, body, strict=True):
                    ours = row.measures.get(name)
                    line.append("" if value is None or ours is None else _difference(ours.mean - value, ours.kind))
        if baseline is not None and name in _against_the_baseline(summary):
            changes = [_changes(row, name, baseline, paper) for row in summary.rows]
            unit = _unit(_kind(summary, name))
            titles = {"ours": "against the baseline"}
            if paper and not paper.same_model and any(value is not None for value in values):
                titles |= {"paper": "paper, against its baseline", "difference": "difference of the changes"}
            for key, title in titles.items():
                header.append(f"{prefix}{title}")
                dense.append("")
                for row, found, line in zip(summary.rows, changes, body, strict=True):
                    change, ends = found[key], found["interval"] if key == "ours" else None
                    between = "" if ends is None else f" [{ends[0] * 100:+.1f}, {ends[1] * 100:+.1f}]"
                    line.append("" if change is None or row is baseline else f"{change * 100:+.1f}{unit}{between}")
    return header, [dense, *body] if summary.dense else body


def _against_the_baseline(summary: Summary) -> list[str]:
    """The measures whose changes from a baseline are shown."""
    return [name for name in summary.measures if name in (main_measure(summary), "average acc")]


def _changes(row: Row, name: str, baseline: Row, paper: Comparison | None) -> dict[str, Any]:
    """A row's change from the baseline in a measure, and that of the published numbers, as shares; None where there is none.

    Returns:
        `ours` and its `interval`, and where the paper's numbers are of another model, of which only changes can be compared,
        `paper` and the `difference` of the two.
    """
    ours = _change(row.measures.get(name), baseline.measures.get(name))
    theirs = None
    if paper and not paper.same_model and name in row.measures:
        values = [paper.value(one, name) for one in (row, baseline)]
        theirs = _change(*(None if value is None else Measure([value], row.measures[name].kind) for value in values))
    difference = None if ours is None or theirs is None else ours - theirs
    return {"ours": ours, "interval": interval(row, baseline, name), "paper": theirs, "difference": difference}


def undrawn(summary: Summary, measure: str | None) -> list[str]:
    """A note where a picture of a measure, None is the main one, leaves out rows that lack it."""
    name = measure or main_measure(summary)
    labels = [label for row, label in zip(summary.rows, row_labels(summary), strict=True) if name not in row.measures]
    return [f"the picture is of {name}, and leaves out what lacks it: {'; '.join(labels)}"] if name and labels else []


def main_measure(summary: Summary) -> str | None:
    """What runs are compared by.

    The perplexity that all rows have; where they have several, the mean gap that they close, if it has one start. Else the
    average accuracy, else the first accuracy; where rows share nothing, the first perplexity or accuracy.
    """
    kinds = {name: _kind(summary, name) for name in summary.measures}
    shared = shared_perplexities(summary)
    accuracies = [name for name, kind in kinds.items() if kind == "accuracy"]
    accuracies.sort(key=lambda name: not name.startswith("average acc"))
    of_all = [name for name in accuracies if all(name in row.measures for row in summary.rows)]
    first = [GAP] * (len(shared) > 1 and GAP in kinds and one_start(summary)) + shared + of_all
    perplexities = [name for name, kind in kinds.items() if kind == "perplexity"]
    return next(iter([*first, *perplexities, *accuracies]), None)


def take_baseline(summary: Summary, text: str | None) -> Row | None:
    """The row that `--baseline` names, from which `gap closed` is measured then; None where nothing was given.

    Raises:
        ConfigError: as `find_row`.
    """
    if not text:
        return None
    baseline = find_row(summary, text, "--baseline")
    close_gaps(summary, baseline)
    return baseline


def find_row(summary: Summary, text: str, option: str) -> Row:
    """The row with these settings, given as `name=value,name=value` after an option.

    Raises:
        ConfigError: a name is no column, or not exactly one row has the values.
    """
    # A value may be a list: a comma parts settings where a column's name follows.
    columns = "|".join(map(re.escape, summary.settings))
    parts = re.split(rf",(?=(?:{columns})=)" if columns else ",", text)
    wanted = {name: value for name, _, value in (part.partition("=") for part in parts)}
    for name, value in wanted.items():
        if name not in summary.settings:
            raise ConfigError(f"{option} {text}: {name} is no column; valid are {', '.join(summary.settings)}")
        present = dict.fromkeys(row.labels[name] for row in summary.rows)
        if value not in present:
            raise ConfigError(f"{option} {text}: no row has {name}={value}; valid are {', '.join(filter(None, present))}")
    rows = [row for row in summary.rows if all(row.labels[name] == value for name, value in wanted.items())]
    if not rows:
        raise ConfigError(f"{option} {text}: no row has all of these settings")
    if len(rows) > 1:
        differ = [name for name in summary.settings if len({row.labels[name] for row in rows}) > 1]
        raise ConfigError(
            f"{option} {text}: {len(rows)} rows have these settings; they differ in {', '.join(differ)}: add one"
        )
    return rows[0]


def shown(measure: Measure) -> str:
    """A number with its uncertainty: the deviation over seeds, or the standard error of a single run."""
    text = _number(measure.mean, measure.kind)
    uncertainty = measure.stderr if measure.deviation is None else measure.deviation
    if uncertainty is not None:
        text += f" ± {_number(uncertainty, measure.kind)}"
    return text


def _number(value: float, kind: str) -> str:
    if kind in ("accuracy", "share"):
        return f"{value:.2%}"
    if kind == "error":
        return f"{value:.4f}"
    if kind == "number":
        return f"{value:.4g}"
    return f"{value:.0f}" if kind == "seconds" else f"{value:.2f}"


def _difference(value: float, kind: str) -> str:
    return f"{value * 100:+.2f}" if kind == "accuracy" else f"{value:+.2f}"


def _change(ours: Measure | None, baseline: Measure | None) -> float | None:
    return None if ours is None or baseline is None else change_between(ours, baseline)


def interval(row: Row, baseline: Row, name: str) -> tuple[float, float] | None:
    """The 95 % interval of a change, as a share of a perplexity or a difference of an accuracy or a gap.

    None where a row is its own baseline, or a row lacks what it needs (`without_interval` says what).
    """
    found = None if row is baseline else paired(row, baseline, name)
    if not isinstance(found, Paired) or not found.whole:
        return None
    _, low, high = found.shown()
    return low, high


def without_interval(summary: Summary, baseline: Row) -> list[str]:
    """A line for each reason why changes from the baseline have no interval, with the number of rows that it holds for."""
    name = main_measure(summary)
    if name is None or name not in baseline.measures:
        return []
    found = [paired(row, baseline, name) for row in summary.rows if row is not baseline and name in row.measures]
    reasons = Counter(pair if isinstance(pair, str) else "not the same seeds" for pair in found if not _whole(pair))
    return [f"no interval for {count} of {len(found)} rows: {reason}" for reason, count in reasons.items()]


def _whole(pair: Paired | str) -> bool:
    return isinstance(pair, Paired) and pair.whole


def comparison(first: Row, second: Row, summary: Summary) -> list[dict[str, Any]]:
    """Two rows in each perplexity, gap and accuracy that both have, as plain values.

    Returns:
        Of each its name, both values, the difference (of a perplexity as a share of the second row's value), `interval`, its
        95 % interval, or None, and `over`, what was resampled, or why there is no interval.
    """
    found = []
    for name in summary.measures:
        ours, theirs = first.measures.get(name), second.measures.get(name)
        if ours is None or theirs is None or not (ours.kind in ("perplexity", "accuracy", "number") or ours.gaps):
            continue
        pair = paired(first, second, name)
        line: dict[str, Any] = {"measure": heading(summary, name), "kind": ours.kind}
        line |= {"first": shown(ours), "second": shown(theirs)}
        if isinstance(pair, str):
            line |= {"difference": _change(ours, theirs), "interval": None, "over": pair}
        else:
            difference, low, high = pair.shown()
            line |= {"difference": difference, "interval": [low, high], "over": pair.over}
        found.append(line)
    return found


def compared(found: list[dict[str, Any]], first: str, second: str, format: str) -> str:
    """What `comparison` found as a table.

    Args:
        found: of two rows.
        first: the first one's name.
        second: the second one's.
        format: one of `FORMATS`.
    """
    if format == "json":
        return json.dumps(finite(found), indent=2, allow_nan=False) + "\n"
    lines = []
    for line in found:
        unit, interval = _unit(line["kind"]), line["interval"]
        between = "" if interval is None else f"{interval[0] * 100:+.1f} to {interval[1] * 100:+.1f}{unit}"
        change = f"{line['difference'] * 100:+.1f}{unit}"
        lines.append((line["measure"], line["first"], line["second"], change, between, line["over"]))
    header = ["measure", first, second, "difference", "95 % interval", "over"]
    return as_text(pd.DataFrame(lines, columns=header), format, 1)


def _unit(kind: str) -> str:
    return " points" if kind in ("accuracy", "share") else "%"


def heading(summary: Summary, name: str) -> str:
    """A measure's name, with a word where some row's value is of a part of the items."""
    # That a perplexity is of the first windows alone stands with the run.
    limited = _kind(summary, name) in ("accuracy", "number") and any(
        row.measures[name].limited for row in summary.rows if name in row.measures
    )
    return f"{name} (limited)" if limited else name


def _kind(summary: Summary, name: str) -> str:
    return next(row.measures[name].kind for row in summary.rows if name in row.measures)


def _record(summary: Summary, row: Row, baseline: Row | None, paper: Comparison | None) -> dict[str, Any]:
    record: dict[str, Any] = {"settings": row.labels, "seeds": [run.config["seed"] for run in row.runs]}
    record["measures"] = {
        name: {"mean": measure.mean, "deviation": measure.deviation, "stderr": measure.stderr, "limited": measure.limited}
        for name, measure in row.measures.items()
    }
    record["dense"] = {
        name: {"mean": measure.mean, "stderr": measure.stderr, "limited": measure.limited}
        for name, measure in summary.dense.items()
    }
    if paper:
        found = {name: paper.value(row, name) for name in row.measures}
        record["paper"] = {"from": paper.heading} | {name: value for name, value in found.items() if value is not None}
    if baseline:
        names = _against_the_baseline(summary)
        record["against_baseline"] = {name: _changes(row, name, baseline, paper) for name in names if name in row.measures}
    record["runs"] = [str(run.directory) for run in row.runs]
    return record
