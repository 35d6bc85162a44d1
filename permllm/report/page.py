"""HTML page of runs that needs no network: quality over minutes, and the table."""

from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import itables
import pandas as pd
import plotly.express as px
from itables.javascript import generate_init_offline_itables_html
from plotly.offline import get_plotlyjs

from permllm.report.measures import number
from permllm.report.plots import MINUTES, dense_lines, points
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
</style>
<script>{plotly}</script></head><body>
<h1>PermLLM: pruned models side by side</h1>
<p>{runs} finished runs in {rows} rows; runs that differ only in their seed share one.</p>
<ul>{notes}</ul>
<h2>Quality over minutes</h2><p>Bars are the ± of the table.</p>{quality}
<h2>Table</h2>{itables}{table}
</body></html>
"""
# Cells such as "56.16% ± 2.00%" are sorted by their first number. Cells without one come last.
_BY_NUMBER = """function (data, type) {
  return type === 'sort' ? parseFloat(data.replace(/^(inf|nan|)$/, 'Infinity')) : data; }"""


def page(table: Table, notes: list[str], measure: str) -> str:
    """Return the HTML of the page. Its security policy forbids it to load anything.

    Args:
        table: table of the runs.
        notes: lines for the reader.
        measure: measure to draw over minutes.
    """
    frame = texts(table, table_cells(table))
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return _FRAME.format(
        runs=len(table.runs),
        rows=len(table.labels),
        plotly=get_plotlyjs(),
        notes="".join(f"<li>{escape(note)}</li>" for note in [*notes, *sources(frame)]),
        quality=_quality(table, measure),
        itables=generate_init_offline_itables_html(bundle).partition("<div")[0],
        table=_table(frame, len(table.settings)),
    )


def _table(frame: pd.DataFrame, words: int) -> str:
    """Return the HTML of a frame, whose first columns, `words` of them, are no numbers."""
    numbers: Any = {
        "targets": [*range(words, frame.shape[1])],
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


def _quality(table: Table, measure: str) -> str:
    """Return the HTML of quality over minutes, with a point for each row; empty without points."""
    frame = points(table, measure)
    if frame.empty:
        return ""
    frame["name"] = frame["name"].map(escape)
    frame["text"] = [
        f"{point['name']}<br>{table.shown(row, measure)}<br>{point['minutes']:.1f} min, "
        f"{point['memory'] / 1e9:.2f} GB at the peak"
        for row, point in frame.iterrows()
    ]
    figure = px.scatter(
        frame,
        x="minutes",
        y="value",
        error_y="error",
        color="name",
        hover_name="text",
        size="memory",
        log_x=True,
        height=520,
        template="plotly_white",
    )
    figure.update_traces(hovertemplate="%{hovertext}<extra></extra>")
    front = frame[frame["front"]].sort_values("minutes")
    figure.add_scatter(
        x=front["minutes"],
        y=front["value"],
        mode="lines",
        line={"shape": "hv", "dash": "dot", "color": "grey"},
        name="Pareto front",
        hoverinfo="skip",
    )
    kind = table.kinds[measure]
    styles = cycle(("dash", "dashdot", "dot"))
    for label, value in dense_lines(table, measure, frame.index).items():
        figure.add_hline(
            value,
            name=escape(f"{label}: {number(value, kind)}"),
            showlegend=True,
            line={"dash": next(styles), "width": 1, "color": "grey"},
        )
    form = ".0%" if kind in ("accuracy", "share") else ""
    figure.update_yaxes(title_text=escape(table.heading(measure)), tickformat=form)
    figure.update_xaxes(title_text=MINUTES)
    # Below the axes, because the name of a row may be as long as the page is wide.
    rows = len(figure.data)
    legend = {"orientation": "v", "yanchor": "top", "y": -0.2, "x": 0}
    figure.update_layout(legend=legend, height=520 + 20 * rows, margin_b=120 + 20 * rows)
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"displaylogo": False},
            div_id="quality",
        )
    )
