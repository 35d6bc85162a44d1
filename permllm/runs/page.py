"""Runs as one HTML page without network: quality over minutes, and the table."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import itables
import pandas as pd
import plotly.express as px
from itables.javascript import generate_init_offline_itables_html
from plotly.offline import get_plotlyjs

from permllm.runs.compare import Comparison
from permllm.runs.plots import MINUTES, drawn_measure, points
from permllm.runs.render import cells
from permllm.runs.table import Table

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'unsafe-inline' 'unsafe-eval' data: blob:">
<title>PermLLM: {runs} runs</title><link rel="icon" href="data:,">
<style>
body {{ font: 15px system-ui, sans-serif; margin: 1em auto; max-width: 1280px; padding: 0 1em }}
#table_wrapper {{ overflow-x: auto }}
</style>
<script>{plotly}</script></head><body>
<h1>PermLLM: pruned models side by side</h1>
<p>{runs} finished runs in {rows} rows; runs that differ only in their seed share one.</p>
<ul>{notes}</ul>
<h2>Quality over minutes</h2>{quality}
<h2>Table</h2>{itables}{table}
</body></html>
"""
# "56.16% ± 2.00%" is sorted by its first number. A text without a number comes last.
_BY_NUMBER = """function (data, type) {
  return type === 'sort' ? parseFloat(data.replace(/^(inf|nan|)$/, 'Infinity')) : data; }"""


def page(
    table: Table,
    notes: list[str],
    paper: Comparison | None = None,
    measure: str | None = None,
) -> str:
    """Return the page as text; its policy forbids it to load anything.

    Args:
        table: of the runs.
        notes: lines for the reader, beside those of the table.
        paper: as in `cells`.
        measure: to draw over minutes; None: the main one.

    Raises:
        ConfigError: no row has the measure.
    """
    every = filter(None, [*notes, *table.notes, paper.note if paper else ""])
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return _FRAME.format(
        runs=len(table.runs),
        rows=len(table.rows),
        plotly=get_plotlyjs(),
        notes="".join(f"<li>{escape(note)}</li>" for note in every),
        quality=_quality(table, drawn_measure(table, measure)),
        itables=generate_init_offline_itables_html(bundle).partition("<div")[0],
        table=_table(cells(table, paper), len(table.settings)),
    )


def _table(frame: pd.DataFrame, words: int) -> str:
    render, targets = itables.JavascriptFunction(_BY_NUMBER), [*range(words, frame.shape[1])]
    options: Any = {"connected": False, "table_id": "table", "paging": False, "showIndex": False}
    # With its default layout itables hides the search box of a table of ten rows or fewer.
    layout = {"topStart": "search", "topEnd": None, "bottomStart": None, "bottomEnd": None}
    options |= {"order": [], "maxBytes": 0, "layout": layout}
    options["columnDefs"] = [{"targets": targets, "render": render, "type": "num"}]
    return str(itables.to_html_datatable(frame, **options))


def _quality(table: Table, measure: str) -> str:
    """Return quality over minutes, a point a row, with the Pareto front; empty without a point."""
    found = points(table, measure)
    if found.empty:
        return ""
    found["method"] = found["method"].map(escape)
    found["text"] = [
        f"{escape(one.name)}<br>{table.shown(row, measure)}<br>{one.minutes:.1f} min, "
        f"{one.memory / 1e9:.2f} GB at the peak"
        for row, one in zip(found.index, found.itertuples(index=False), strict=True)
    ]
    columns = {"x": "minutes", "y": "value", "error_y": "error", "color": "method"}
    columns |= {"hover_name": "text", "size": "memory"}
    figure = px.scatter(found, **columns, log_x=True, height=520, template="plotly_white")
    figure.update_traces(hovertemplate="%{hovertext}<extra></extra>")
    front = found[found["front"]].sort_values("minutes")
    look: Any = {"line": {"shape": "hv", "dash": "dot", "color": "grey"}, "hoverinfo": "skip"}
    look |= {"mode": "lines", "name": "Pareto front"}
    figure.add_scatter(x=front["minutes"], y=front["value"], **look)
    dense = f"; dense: {table.shown_dense(measure)}" if measure in table.dense else ""
    form = ".0%" if table.kinds[measure] in ("accuracy", "share") else ""
    figure.update_yaxes(title_text=escape(table.heading(measure) + dense), tickformat=form)
    figure.update_xaxes(title_text=MINUTES)
    whole = {"full_html": False, "include_plotlyjs": False, "config": {"displaylogo": False}}
    return str(figure.to_html(**whole, div_id="quality"))
