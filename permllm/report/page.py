"""HTML page of runs that needs no network: quality over minutes, and the table."""

from html import escape
from io import StringIO
from pathlib import Path

import itables
import pandas as pd
from itables.javascript import generate_init_offline_itables_html
from matplotlib import rc_context

from permllm.report.plots import plot_cost, points
from permllm.report.render import sources, table_cells, texts
from permllm.report.table import Table, details, naming, row_names

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
#table tr > :first-child {{ position: sticky; left: 0; background: white }}
#table col {{ width: 8em !important }}
#table col:first-child {{ width: min(24em, 40vw) !important }}
#table td:first-child {{ white-space: normal !important }}
.metric:not([hidden]) {{ display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start }}
svg {{ width: 600px; max-width: 100%; height: auto }}
</style></head><body>
<h1>PermLLM: pruned models side by side</h1>
<p>{runs} finished runs in {rows} rows; runs that differ only in their seed share one.</p>
<h2>Quality over minutes</h2>{quality}
<p>Minutes run from calibration to pruning. The area of a point is the peak of memory, its bar the
± of the table. Dotted: Pareto front. *: calibration or allocation from the cache.</p>
<h2>Table</h2>{itables}{table}
<h2>Notes</h2><ul>{notes}</ul>
</body></html>
"""
_SWITCH = """<label>Metric <select onchange="document.querySelectorAll('.metric').forEach(
 (part, place) => part.hidden = place != this.selectedIndex)">{options}</select></label>
{pictures}"""
# Cells such as "56.16% ± 2.00%" are sorted by their first number. Cells without one come last.
_BY_NUMBER = """function (data, type) {
  return type === 'sort' ? parseFloat(data.replace(/^(inf|nan|)$/, 'Infinity')) : data; }"""


def page(table: Table, notes: list[str], metric: str) -> str:
    """Return the HTML of the page. Its security policy forbids it to load anything.

    Args:
        table: table of the runs.
        notes: lines for the reader.
        metric: metric to draw over minutes first.
    """
    cells = table_cells(table)
    settings = [*naming(table.labels), *details(table.labels)]
    frame = texts(table, cells).drop(columns=settings)
    frame.insert(0, "row", row_names(table.labels).reindex(frame.index).fillna("dense"))
    numbers = [*range(1, frame.shape[1])]
    frame = frame.join(table.labels[settings]).fillna("")
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    return _FRAME.format(
        runs=len(table.runs),
        rows=len(table.labels),
        notes="".join(f"<li>{escape(note)}</li>" for note in [*notes, *sources(frame)]),
        quality=_quality(table, metric),
        itables=generate_init_offline_itables_html(bundle).partition("<div")[0],
        table=_table(frame, numbers),
    )


def _table(frame: pd.DataFrame, numbers: list[int]) -> str:
    render = itables.JavascriptFunction(_BY_NUMBER)
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
            columnDefs=[{"targets": numbers, "render": render, "type": "num"}],
        )
    )


def _quality(table: Table, first: str) -> str:
    """Return the HTML of quality over minutes, with a switch of the metric; empty: no points."""
    options = ""
    pictures = ""
    for name in sorted(table.usual, key=lambda name: name != first):
        frame = points(table, name)
        quality = table.kind(name) in ("perplexity", "accuracy") or name in table.gaps
        if frame.empty or not (quality or name == first):
            continue
        text = "".join(_svg(table, name, model) for model in frame["model"].unique())
        for row, point in frame.iterrows():
            cost = f"{point['minutes']:.1f} min, {point['memory'] / 1e9:.2f} GB at the peak"
            title = escape(f"{point['name']}\n{table.shown(row, name)}\n{cost}")
            text = text.replace(f'<g id="point-{row}">', f"<g><title>{title}</title>")
        hidden = " hidden" * bool(pictures)
        options += f"<option>{escape(table.heading(name))}</option>"
        pictures += f'<div class="metric"{hidden}>{text}</div>'
    return _SWITCH.format(options=options, pictures=pictures) if pictures else ""


def _svg(table: Table, name: str, model: str) -> str:
    file = StringIO()
    with rc_context({"svg.fonttype": "none", "savefig.format": "svg"}):
        plot_cost(table, file, name, model)
    return "<svg" + file.getvalue().partition("<svg")[2]  # without the head of a file
