"""Runs as one HTML page without network: quality over minutes, the table, and a chosen run."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import itables
import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from itables.javascript import generate_init_offline_itables_html
from PIL import Image
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from permllm.errors import DataError
from permllm.runs.compare import Comparison
from permllm.runs.files import PERMUTATIONS
from permllm.runs.measures import setting_text
from permllm.runs.plots import MINUTES, by_layer, points, worth_minutes
from permllm.runs.read import Run
from permllm.runs.render import cells, machine
from permllm.runs.table import Table

_SIDE = 192  # pixels of a picture of a permutation
_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>PermLLM: {runs} runs</title><link rel="icon" href="data:,">
<style>
body {{ font: 15px system-ui, sans-serif; margin: 1em auto; max-width: 1280px; padding: 0 1em }}
#table_wrapper {{ overflow-x: auto }} figure {{ display: inline-block; margin: 0 1em 1em 0 }}
figcaption {{ font-size: 12px }}
img {{ border: 1px solid #999; image-rendering: pixelated }}
</style>
<script>{plotly}</script></head><body>
<h1>PermLLM: pruned models side by side</h1>
<p>{runs} finished runs in {rows} rows; runs that differ only in their seed share one.</p>
<ul>{notes}</ul>
<h2>Quality over minutes</h2>{quality}
<h2>Table</h2>{itables}{table}
<h2>A run</h2><p><label>Run <select id="run">{options}</select></label></p>{curves}{details}
<script>
const chosen = document.getElementById("run"), curves = document.getElementById("curves");
function show() {{
  const name = chosen.value;
  for (const one of document.querySelectorAll(".run")) one.hidden = one.dataset.run !== name;
  Plotly.restyle(curves, {{ visible: curves.data.map((one) => String(one.meta) === name) }});
}}
chosen.addEventListener("change", show);
document.getElementById("quality").on("plotly_click", ({{ points }}) => {{
  chosen.value = points[0].customdata[0]; show();
}});
show();
</script></body></html>
"""
# "56.16% ± 2.00%" is sorted by its first number. A text without a number comes last.
_BY_NUMBER = """function (data, type) {
  return type === 'sort' ? parseFloat(data.replace(/^(inf|nan|)$/, 'Infinity')) : data; }"""


def page(table: Table, notes: list[str], paper: Comparison | None = None) -> str:
    """Return the page as text; its policy forbids it to load anything. `paper` as in `cells`."""
    every = filter(None, [*notes, *table.notes, paper.note if paper else ""])
    options, details = "", ""
    for name, members in zip(table.names(), table.rows, strict=True):
        for run in members:
            text = escape(f"{name}, seed {table.runs[run].config['seed']}")
            options += f'<option value="{run}">{text}</option>'
            details += _details(table.runs[run], run)
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return _FRAME.format(
        runs=len(table.runs),
        rows=len(table.rows),
        plotly=get_plotlyjs(),
        notes="".join(f"<li>{escape(note)}</li>" for note in every),
        quality=_html(quality(table), "quality"),
        itables=generate_init_offline_itables_html(bundle).partition("<div")[0],
        table=_table(cells(table, paper), len(table.settings)),
        options=options,
        curves=_html(curves(table.runs), "curves"),
        details=details,
    )


def _html(figure: go.Figure, name: str) -> str:
    look = {"full_html": False, "include_plotlyjs": False, "config": {"displaylogo": False}}
    return str(figure.to_html(**look, div_id=name))


def _table(frame: pd.DataFrame, words: int) -> str:
    render, targets = itables.JavascriptFunction(_BY_NUMBER), [*range(words, frame.shape[1])]
    options: Any = {"connected": False, "table_id": "table", "paging": False, "showIndex": False}
    options |= {"order": [], "maxBytes": 0, "layout": {"topEnd": "search"}}
    options["columnDefs"] = [{"targets": targets, "render": render, "type": "num"}]
    return str(itables.to_html_datatable(frame, **options))


def quality(table: Table) -> go.Figure:
    """Return quality over minutes: for each measure a point a row, and the Pareto front."""
    figure, buttons = go.Figure(), []
    for name in worth_minutes(table):
        found = points(table, name)
        if found.empty:
            continue
        found["method"] = found["method"].map(escape)
        found["text"] = [
            f"{escape(one.name)}<br>{table.shown(row, name)}<br>{one.minutes:.1f} min, "
            f"{one.memory / 1e9:.2f} GB at the peak"
            for row, one in zip(found.index, found.itertuples(index=False), strict=True)
        ]
        columns = {"x": "minutes", "y": "value", "error_y": "error", "color": "method"}
        columns |= {"hover_name": "text", "size": "memory"}
        drawn = px.scatter(found, **columns, custom_data=["run"])
        drawn.update_traces(hovertemplate="%{hovertext}<extra></extra>")
        front = found[found["front"]].sort_values("minutes")
        look: Any = {"line": {"shape": "hv", "dash": "dot", "color": "grey"}, "hoverinfo": "skip"}
        look |= {"mode": "lines", "name": "Pareto front"}
        drawn.add_scatter(x=front["minutes"], y=front["value"], **look)
        figure.add_traces(drawn.update_traces(meta=name, visible=not figure.data).data)
        form = ".0%" if table.kinds[name] in ("accuracy", "share") else ""
        dense = f"; dense: {table.shown_dense(name)}" if name in table.dense else ""
        title = {"text": escape(table.heading(name) + dense)}
        buttons.append((name, {"yaxis": {"title": title, "tickformat": form}}))
    if buttons:
        menu = [
            {
                "label": escape(name),
                "method": "update",
                "args": [{"visible": [trace.meta == name for trace in figure.data]}, axis],
            }
            for name, axis in buttons
        ]
        place = {"x": 0, "xanchor": "left", "y": 1.15}
        figure.update_layout(buttons[0][1], updatemenus=[{"buttons": menu, **place}])
    axis = {"title": {"text": MINUTES}, "type": "log"}
    return figure.update_layout(xaxis=axis, height=520, template="plotly_white")


def curves(runs: list[Run]) -> go.Figure:
    """Return the learning curves of each run; `meta` of a trace is the number of its run."""
    titles = ("loss", "temperature", "channels that changed place")
    figure = make_subplots(cols=3, subplot_titles=titles)
    for number, run in enumerate(runs):
        for key, column in (("loss", 1), ("measured_loss", 1), ("temperature", 2), ("flips", 3)):
            values = [entry.get(key) for entry in run.history]
            look = {"name": key, "meta": number, "mode": "lines+markers", "row": 1, "col": column}
            if any(value is not None for value in values):
                figure.add_scatter(x=[*range(1, len(values) + 1)], y=values, **look)
    figure.update_layout(height=320, template="plotly_white")
    return figure.update_xaxes(title_text="epoch", dtick=1)


def _details(run: Run, number: int) -> str:
    try:
        drawn = _permutations(run.directory / PERMUTATIONS)
    except DataError as error:
        drawn = escape(str(error))
    settings = {
        key.removesuffix(".name"): setting_text(value) for key, value in run.identity.items()
    }
    hint = "Permutations: position to the right, original position upwards."
    facts = [
        str(run.directory),
        machine([run]) if "hardware" in run.environment else "no environment.json",
        ", ".join(f"{stage} {value:.1f} s" for stage, value in run.metrics["seconds"].items()),
        ", ".join(f"{key}={value}" for key, value in settings.items()),
        hint if drawn else "No permutations are kept here.",
    ]
    lines = "".join(f"<p>{escape(fact)}</p>" for fact in facts)
    return f'<div class="run" data-run="{number}" hidden>{lines}{drawn}</div>'


def _permutations(file: Path) -> str:
    """Return pictures of the permutations of the first, the middle and the last layer of a run."""
    if not file.is_file():
        return ""
    from permllm.runs.tensors import load_orders

    orders, drawn = load_orders(file), ""
    layers = by_layer(orders)
    for layer in sorted({0, len(layers) // 2, len(layers) - 1}):
        for name in layers[layer]:
            drawn += _picture(name, orders[name].numpy())
    return drawn


def _picture(name: str, order: np.ndarray[Any, Any]) -> str:
    side, places = min(len(order), _SIDE), np.arange(len(order))
    pixels = np.full((side, side), 255, dtype=np.uint8)
    pixels[side - 1 - order * side // len(order), places * side // len(order)] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    said = f"{escape(name)}<br>{(order != places).mean():.1%} of {len(order)} channels moved"
    return f'<figure><img src="{source}" alt=""><figcaption>{said}</figcaption></figure>'
