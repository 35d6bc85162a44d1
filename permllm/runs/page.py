"""Runs as one HTML page that needs nothing else: the table, its plots, and for each run what it was and what it found.

Plots are Plotly's, the table is DataTables' (which itables ships), the frame Jinja2's; the scripts lie in the page compressed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import math
import re
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from permllm.config import finite
from permllm.runs import cost
from permllm.runs.details import details
from permllm.runs.plots import numeric_setting
from permllm.runs.published import Comparison
from permllm.runs.read import Collection
from permllm.runs.render import cells, heading, main_measure, shown
from permllm.runs.table import Measure, Row, Summary, row_labels, setting_text

_CURVES = {
    "loss": "loss, mean of the epoch",
    "measured_loss": "loss of the permutation after the epoch",
    "temperature": "temperature",
    "flips": "share of channels that changed place",
}
_Json = dict[str, Any]


def page(collection: Collection, summary: Summary, baseline: Row | None = None, paper: Comparison | None = None) -> str:
    """The page as text: styles, scripts and data are inside, and its policy forbids it to load anything.

    Of `collection` its notes are shown, of `summary` all; `baseline` and `paper` are as for `permllm.runs.render.render`.
    """
    here = Path(__file__).parent
    frame = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    frame.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    header, body = cells(summary, baseline, paper)
    dense = body.pop(0) if summary.dense else None
    count = len(summary.settings)
    labels = [f"{number} {name}" for number, name in enumerate(row_labels(summary), 1)]
    ours = (here / "page.js").read_text(encoding="utf-8")
    libraries = [get_plotlyjs(), _datatables()]
    # With their digests in the policy no other script can run, whatever a record says.
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (ours, *libraries)]
    return frame.from_string((here / "page.html").read_text(encoding="utf-8")).render(
        title=f"PermLLM: {len(collection.runs)} runs",
        notes=[*collection.left_out(), *summary.notes, *([paper.note] if paper and paper.note else [])],
        header=header,
        # With many settings the numbers would be out of sight.
        columns=[*range(count, len(header)), *range(count)] if count > 6 else [*range(len(header))],
        count=count,
        dense=dense and ["", *dense[1:]],
        rows=[*zip(summary.rows, body, labels, strict=True)],
        baseline=baseline,
        sort_key=sort_key,
        sections=sections(summary, labels),
        runs=details(summary),
        script=ours,
        policy=" ".join(f"'sha256-{digest}'" for digest in digests),
        libraries=[base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() for text in libraries],
        styles=[_of_itables("css"), (here / "page.css").read_text(encoding="utf-8")],
    )


def _of_itables(suffix: str) -> str:
    # Found, not imported: some versions want IPython.
    return Path(str(distribution("itables").locate_file(f"itables/html/dt_bundle.{suffix}"))).read_text(encoding="utf-8")


def _datatables() -> str:
    """The module of itables as a script that leaves what it exports in `itables`; a module inside of a page has none."""
    code, exports, licences = re.split(r"\bexport\s*{([^}]*)};?", _of_itables("js"))
    names = re.sub(r"([\w$]+) as ([\w$]+)", r"\2: \1", exports)
    return f'globalThis.itables=(()=>{{"use strict";{code}return {{{names}}};{licences}}})();'


def sort_key(text: str) -> float | str:
    """What a cell is sorted by: its first number, else the text; nothing, which comes last, where that is no finite number."""
    try:
        number = float(text.split(" ", maxsplit=1)[0].rstrip("%"))
    except ValueError:
        return text
    return number if math.isfinite(number) else ""


def sections(summary: Summary, labels: list[str]) -> dict[str, dict[str, _Json]]:
    """Plotly's figures, by section and by what is chosen in it; a section that would be empty is left out.

    A trace of a row has the row's place, and the number of its colour, in `meta`; a line that joins rows says there which.
    """
    first = sorted(summary.measures, key=lambda name: name != main_measure(summary))
    accuracies = sorted((name for name in first if cost.kind(summary, name) == "accuracy"), key=lambda n: n != "average acc")
    found = {
        "Quality over minutes": {name: _cost(summary, labels, name) for name in cost.measures(summary)},
        "Measures": {name: _measure(summary, labels, name) for name in first if name not in accuracies},
        "Accuracy": {name: _measure(summary, labels, name) for name in accuracies},
        "While learning": {title: _curves(summary, labels, key, title) for key, title in _CURVES.items()},
    }
    some = {section: {name: figure for name, figure in chosen.items() if figure["data"]} for section, chosen in found.items()}
    return {section: finite(chosen) for section, chosen in some.items() if chosen}


def _cost(summary: Summary, labels: list[str], name: str) -> _Json:
    """A point a row, peak memory as its area, in the colour of its method."""
    points = cost.points(summary, name)
    methods = cost.methods(summary)
    largest = max([1, *(point.memory for point in points)])
    traces = []
    for point in points:
        method = methods[point.row]
        text = [labels[point.row], shown(summary.rows[point.row].measures[name])]
        text += [f"{point.minutes:.1f} min", f"{point.memory / 1e9:.2f} GB at the peak"]
        trace = _trace(point.row, method, text, list(dict.fromkeys(methods)).index(method), [point.minutes], [point.value])
        marker = {"size": 8 + 16 * math.sqrt(point.memory / largest), "opacity": 0.75}
        look = {"mode": "markers", "marker": marker, "error_y": {"array": [point.error]}}
        traces.append(trace | look | {"legendgroup": method})
    meta = {"join": "lower" if cost.lower_is_better(summary, name) else "higher"}
    front = {"mode": "lines", "name": "Pareto front", "line": {"shape": "hv", "dash": "dot"}, "meta": meta}
    y = _axis(heading(summary, name), [point.value for point in points if cost.kind(summary, name) == "perplexity"])
    y |= {"tickformat": ".0%"} if cost.kind(summary, name) in ("accuracy", "share") else {}
    x = _axis(cost.MINUTES, [point.minutes for point in points])
    return _figure([*traces, *[front] * bool(traces)], x, y, dense=summary.dense.get(name))


def _measure(summary: Summary, labels: list[str], name: str) -> _Json:
    """A line over the one setting that varies, where it is a number; else bars."""
    setting = numeric_setting(summary)
    bar = {"type": "bar", "orientation": "h", "textposition": "none"}
    traces: list[_Json] = []
    for number, (row, label) in enumerate(zip(summary.rows, labels, strict=True)):
        if name in row.measures:
            measure, error = row.measures[name], {"array": [row.measures[name].error]}
            x, y = (float(row.labels[setting]), measure.mean) if setting else (measure.mean, f"#{number + 1}")
            look = {"mode": "markers", "error_y": error} if setting else bar | {"error_x": error}
            traces.append(_trace(number, label, [label, shown(measure)], 0, [x], [y]) | look | {"showlegend": False})
    axis = _axis(heading(summary, name)) | {"tickformat": ".1%" if cost.kind(summary, name) in ("accuracy", "share") else ""}
    if setting:
        line = {"mode": "lines", "meta": {"join": "all"}, "showlegend": False}
        across = _axis(setting, [trace["x"][0] for trace in traces])
        return _figure([*traces, line], across, axis, "y", summary.dense.get(name))
    rows = {"type": "category", "ticktext": [_plain(label[:44]) for label in labels]}
    rows["tickvals"] = [f"#{number}" for number in range(1, len(labels) + 1)]
    return _figure(traces, axis, rows, "x", summary.dense.get(name))


def _curves(summary: Summary, labels: list[str], key: str, title: str) -> _Json:
    learned = [(number, run) for number, row in enumerate(summary.rows) for run in row.runs if run.history]
    colours = list(dict.fromkeys(number for number, _ in learned))
    traces = []
    for number, run in learned:
        values = [entry.get(key) for entry in run.history]
        if any(value is not None for value in values):
            text = [labels[number], f"seed {setting_text(run.config.get('seed'))}"]
            trace = _trace(number, labels[number], text, colours.index(number), [*range(1, len(values) + 1)], values)
            traces.append(trace | {"mode": "lines+markers"})
    return _figure(traces, _axis("epoch") | {"type": "category"}, _axis(title))


def _trace(row: int, name: str, text: list[str], colour: int, x: Sequence[float], y: Sequence[float | str | None]) -> _Json:
    lines, meta = ["<br>".join(map(_plain, text))] * len(x), {"row": row, "colour": colour}
    return {"type": "scatter", "name": _plain(name[:44]), "text": lines, "meta": meta, "x": x, "y": y}


def _figure(traces: list[_Json], x: _Json, y: _Json, axis: str = "y", dense: Measure | None = None) -> _Json:
    """With a line across one axis where the dense model is."""
    shapes = []
    if dense and math.isfinite(dense.mean):
        ends = {f"{axis}0": dense.mean, f"{axis}1": dense.mean} | ({"xref": "paper"} if axis == "y" else {"yref": "paper"})
        label = {"text": f"dense {shown(dense)}", "textposition": "end", "textangle": 0, "xanchor": "right"}
        shapes.append({"type": "line", "x0": 0, "x1": 1, "y0": 0, "y1": 1} | ends | {"label": label})
    return {"data": traces, "layout": {"xaxis": x, "yaxis": y, "shapes": shapes}}


def _axis(title: str, values: Sequence[float] = ()) -> _Json:
    """An axis; logarithmic where values span much, with round numbers, as Plotly's own are digits alone within a decade."""
    if not values or not 0 < 4 * min(values) <= max(values):
        return {"title": {"text": _plain(title)}}
    ticks = [digit * 10.0**decade for decade in range(-4, 7) for digit in (1, 1.5, 2, 3, 5, 7)]
    axis = {"title": {"text": f"{_plain(title)} (log)"}, "type": "log"}
    return axis | {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _plain(text: str) -> str:
    """A text that Plotly shows as it is, not as its markup."""
    return html.escape(text, quote=False)
