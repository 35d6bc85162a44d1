"""HTML page of runs that needs no network: quality over minutes, the table, and each row."""

from collections.abc import Callable
from functools import partial
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import itables
import pandas as pd
from itables.javascript import generate_init_offline_itables_html
from matplotlib import rc_context

from permllm.report.gaps import GAP
from permllm.report.plots import plot_cost, points
from permllm.report.render import sources, table_cells, texts
from permllm.report.table import Table

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'unsafe-inline' 'unsafe-eval' data: blob:">
<title>PermLLM: {runs} runs</title><link rel="icon" href="data:,">
<style>
body {{ font: 15px system-ui, sans-serif; margin: 1em auto; max-width: 1280px; padding: 0 1em }}
#table_wrapper {{ overflow-x: auto }}
#table th * {{ white-space: normal !important }}
#table th {{ min-width: 5em }}
svg {{ max-width: 100%; height: auto }}
.narrow {{ display: none }}
@media (max-width: 700px) {{ .narrow {{ display: block }} .wide {{ display: none }} }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 0.5em }}
summary {{ cursor: pointer; padding: 0.2em 0 }}
</style></head><body>
<h1>PermLLM: pruned models side by side</h1>
<p>{runs} finished runs in {rows} rows; runs that differ only in their seed share one.</p>
<ul>{notes}</ul>
<h2>Quality over minutes</h2>
<p>Bars are the ± of the table. A click on a point opens its row below.</p>{quality}
<h2>Table</h2>{itables}{table}
<h2>Rows</h2><p>Commands and commits.</p>{details}
</body></html>
"""
_SWITCH = """<label>Measure <select onchange="document.querySelectorAll('.measure').forEach(
 (part, place) => part.hidden = place != this.selectedIndex)">{options}</select></label>
{pictures}"""
# Width and height of pictures in inches, for a wide and a narrow screen.
_SIZES = {"wide": (12.5, 6.5), "narrow": (4.2, 4.0)}
# Cells such as "56.16% ± 2.00%" are sorted by their first number. Cells without one come last.
_BY_NUMBER = """function (data, type) {
  return type === 'sort' ? parseFloat(data.replace(/^(inf|nan|)$/, 'Infinity')) : data; }"""


def page(table: Table, notes: list[str], measure: str) -> str:
    """Return the HTML of the page. Its security policy forbids it to load anything.

    Args:
        table: table of the runs.
        notes: lines for the reader.
        measure: measure to draw over minutes first.
    """
    settings = [*table.settings, *table.details()]
    names = pd.Series(table.names())
    frame = texts(table, table_cells(table)).drop(columns=settings)
    frame.insert(0, "row", names.reindex(frame.index).fillna("dense"))
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return _FRAME.format(
        runs=len(table.runs),
        rows=len(table.labels),
        notes="".join(f"<li>{escape(note)}</li>" for note in [*notes, *sources(frame)]),
        quality=_quality(table, measure),
        itables=generate_init_offline_itables_html(bundle).partition("<div")[0],
        table=_table(frame.join(table.labels[settings]).fillna(""), frame.shape[1]),
        details="".join(_details(table, row, name) for row, name in names.items()),
    )


def _table(frame: pd.DataFrame, measures: int) -> str:
    """Return the HTML of a frame: names, numbers before column `measures`, and settings."""
    numbers: Any = {
        "targets": [*range(1, measures)],
        "render": itables.JavascriptFunction(_BY_NUMBER),
        "type": "num",
    }
    return str(
        itables.to_html_datatable(
            frame,
            connected=False,
            table_id="table",
            paging=False,
            showIndex=False,
            order=[],
            maxBytes=0,
            # With its default layout itables hides the search box of a table with ten rows or less.
            layout={"topStart": "search", "topEnd": None, "bottomStart": None, "bottomEnd": None},
            columnDefs=[numbers],
        )
    )


def _quality(table: Table, first: str) -> str:
    """Return the HTML of quality over minutes, with a switch of the measure; empty: no points."""
    options = []
    pictures: list[str] = []
    for name in sorted(table.measures, key=lambda name: name != first):
        frame = points(table, name)
        quality = table.kinds[name] in ("perplexity", "accuracy") or name.startswith(GAP)
        if frame.empty or not (quality or name == first):
            continue
        text = ""
        for screen, size in _SIZES.items():
            drawn = _svg(partial(plot_cost, table, name=name, size=size))
            text += f'<div class="{screen}">{drawn}</div>'
        for row, point in frame.iterrows():
            cost = f"{point['minutes']:.1f} min, {point['memory'] / 1e9:.2f} GB at the peak"
            title = escape(f"{point['name']}\n{table.shown(row, name)}\n{cost}")
            text = text.replace(f'<g id="point-{row}">', f"<g><title>{title}</title>")
        hidden = " hidden" * bool(pictures)
        options.append(f"<option>{escape(table.heading(name))}</option>")
        pictures.append(f'<div class="measure"{hidden}>{text}</div>')
    return _SWITCH.format(options="".join(options), pictures="".join(pictures)) if pictures else ""


def _svg(draw: Callable[[StringIO], None]) -> str:
    """Return a picture as a part of a page."""
    file = StringIO()
    with rc_context({"svg.fonttype": "none", "savefig.format": "svg"}):
        draw(file)
    return "<svg" + file.getvalue().partition("<svg")[2]  # without the head of a file


def _details(table: Table, row: int, name: str) -> str:
    """Return the HTML of a row that opens: command and commit of each run."""
    text = ""
    for place in table.members(row).index:
        run = table.runs[place]
        environment = {"git": None, "command": "", "started": ""} | run.environment
        git = {"commit": "unknown", "dirty": False} | (environment["git"] or {})
        commit = git["commit"] + " with uncommitted changes" * git["dirty"]
        about = f"commit {commit}, seed {run.config['seed']}, {environment['started']}"
        if environment["command"]:  # records have none
            text += f"<pre>{escape(environment['command'])}</pre>"
        text += f"<p>{escape(f'{about}, {run.directory}')}</p>"
    inside = f'<div id="row-{row}">{text}</div>'
    return f"<details><summary>{escape(name)}</summary>{inside}</details>"
