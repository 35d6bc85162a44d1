"""Make the tables of documents anew.

    python scripts/readme_tables.py [--check] README.md experiments/*/README.md

A table stands between `<!-- view: table records=records.jsonl columns=block_size -->` and `<!--
/view -->`, files are named from the document's folder. With --check nothing is written, and 1 is
returned where a document is stale.

A view is a function with the document's folder as first argument. `records` are files of records,
with spaces between them. `baseline` are settings of the row from which the gap is measured.
`<!-- view: FILE.yaml NAME -->` is the view of that name in a file beside the records.
"""

import argparse
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.command import run_tool
from permllm.errors import ConfigError, DataError
from permllm.report.compare import paired
from permllm.report.gaps import GAP, gap_closed
from permllm.report.metrics import SPEED_LIMIT
from permllm.report.plots import points
from permllm.report.published import Comparison, published
from permllm.report.read import Run, collect
from permllm.report.render import as_text, changes_from, markdown, table_cells, texts
from permllm.report.table import DENSE_ROW, Table, choose, find, naming, table_of
from permllm.settings.composition import composed
from permllm.settings.config import METHOD_GROUPS, NMPattern
from permllm.settings.options import options as options_of
from permllm.store.files import RECORDS, read_json, read_lines, read_yaml, write_text
from scripts.memory_table import gigabytes, memory
from scripts.provenance import machine, processor
from scripts.reruns import reruns
from scripts.two_of_four import stored_share, window_count

_BLOCK = re.compile(r"(<!-- view: ([^\n]*) -->\n).*?(<!-- /view -->)", re.DOTALL)
_SHOWN = "perplexity, gap closed, average acc, saliency retained, output error, zeros, seconds"
# Settings that tell rows with other methods apart.
_OF_METHODS = [f"{group}.name" for group in METHOD_GROUPS]
_OF_METHODS += ["permutation.constraint", "reconstruction.start"]


def table(
    folder: Path,
    records: str = RECORDS,
    sort: str = "",
    baseline: str = "",
    columns: str = "",
    metrics: str = _SHOWN,
) -> str:
    """Return runs as `permllm results` shows them, and what they were measured with.

    With `sort` the rows follow the dense model's by this metric, the largest value first.
    """
    found = table_of(_runs(folder, records), baseline)
    frame = texts(found, table_cells(found, choose(found, metrics)), columns)
    if sort:
        values = found.means[sort].drop(DENSE_ROW)
        frame = _chosen(frame, values.sort_values(ascending=False, kind="stable").index)
    return f"{markdown(frame)}\n{_machine(found.runs)}"


def paper(
    folder: Path,
    table: str,
    baseline: str,
    settings: str = "",
    columns: str = "pruner,permutation",
    metrics: str = _SHOWN,
) -> str:
    """Return our runs beside a table of the paper, with further settings of their command."""
    found = table_of(_runs(folder, RECORDS), baseline)
    compared = Comparison(table, found.labels["model"])
    cells = table_cells(found, choose(found, metrics), compared)
    gap = "The gap closed is a share of the log-perplexity between the row that closes 0.00% and"
    command = f"python run.py experiment={table} model=smollm2-135m protocol=offline budget=quick"
    parts = [
        f"\n    {command} {settings}".rstrip() + "\n",
        markdown(texts(found, cells, columns)),
        f"{' '.join(compared.notes)} {gap} the dense model.\n",
        _provenance(found.runs),
    ]
    theirs = published(table)
    theirs["value"] = theirs["value"].map("{:g}".format)
    names = ["model", "sparsity", "method", "setting", "metric"]
    by_metric = theirs.set_index(names)["value"].unstack(sort=False)
    parts += [f"The paper's {table.replace('table', 'table ')}:\n"]
    return "\n".join([*parts, as_text(by_metric.reset_index(), "md")])


def frontier(
    folder: Path, baseline: str, records: str, columns: str = "", methods: str = ""
) -> str:
    """Return rows by the gap that they close, with minutes, processor and memory (`points`).

    Args:
        methods: options of the group `method`, whose rows alone are shown, in the place of columns.
    """
    found = table_of(_runs(folder, records), baseline)
    drawn = points(found, GAP).sort_values("value", ascending=False, kind="stable")
    frame = _gap_texts(found, "method" if methods else columns)
    if methods:
        names = {_row(found, method): f"`{method}`" for method in methods.split()}
        drawn = drawn[drawn.index.isin(names)]
        frame = frame.drop(columns=naming(found.labels, "method"))
        frame.insert(0, "method", frame.index.map({DENSE_ROW: "dense"} | names))
    frame = _chosen(frame, drawn.index)
    costs = {
        "minutes": drawn["minutes"].map("{:.1f}".format),
        "on": [_computed_on(_fastest(found, row)) for row in drawn.index],
        "peak memory": (drawn["memory"] / 1e9).map("{:.2f} GB".format),
    }
    for name, values in costs.items():
        frame.insert(frame.columns.get_loc(GAP), name, ["", *values])
    return f"{markdown(frame)}\n{_machine(found.runs)}"


def differences(folder: Path, baseline: str, columns: str, metrics: str, records: str) -> str:
    """Return the difference of each row from the baseline in some metrics, with 95 % intervals."""
    found = table_of(_runs(folder, records), baseline)
    start = find(found.labels, baseline, "view")
    frame = found.labels[naming(found.labels, columns)].copy()
    for name in choose(found, metrics):
        frame[name] = changes_from(found, start, name)["text"]
    return markdown(frame.drop(start).fillna(""))


def claims(
    folder: Path,
    baseline: str,
    metric: str = GAP,
    of_one_seed: str = "0",
    of_heuristic: str = "",
    **claims: str,
) -> str:
    """Return for each claim by how much a row is better than another, and whether that is certain.

    Two seeds decide nothing.

    Args:
        baseline: settings of the row from which the gap is measured.
        metric: a gap or an accuracy.
        of_one_seed: points that the interval of one seed must be away from zero.
        of_heuristic: the same, where a row has the heuristic permutation alone; empty: no other.
        claims: by claim `FILE... BETTER OTHER`, files of records and the settings of two rows.
    """
    lines = []
    for claim, compared in claims.items():
        *files, better, other = compared.split()
        # A run may be in the records of several tables.
        found = table_of(collect([folder / file for file in files]).runs, baseline)
        first, second = (find(found.labels, settings, "view") for settings in (better, other))
        pair = paired(found, first, second, metric)
        needed = 0.0
        if pair["seeds"] == 1:
            methods = {found.members(row)[0].methods for row in (first, second)}
            of_rerun = of_heuristic if "heuristic" in methods and of_heuristic else of_one_seed
            needed = float(of_rerun) / 100
        low, high = pair["interval"]
        verdict = "not decided"
        if pair["seeds"] != 2 and low > needed:
            verdict = "holds"
        elif pair["seeds"] != 2 and high < -needed:
            verdict = "does not hold here"
        values, others = (found.by_seed(row, metric)["value"] for row in (first, second))
        each = (values - others).dropna()
        of_seeds = ", ".join(f"{round(100 * value, 1) + 0.0:+.1f}" for value in each)
        lines.append((claim, f"`{better}`", f"`{other}`", pair["change"], of_seeds, verdict))
    columns = ["claim", "this row", "closes more than", "difference", "of each seed", "verdict"]
    if metric != GAP:
        columns[2] = "is more accurate than"
    return as_text(pd.DataFrame(lines, columns=columns), "md")


def repeated(folder: Path, records: str, least: str) -> str:
    """Return the runs that were measured again with other numbers.

    Args:
        records: patterns of files of records.
        least: smallest difference to show, in points of the gap.
    """
    files = [file for pattern in records.split() for file in sorted(folder.glob(pattern))]
    runs = [run for file in files for run in collect([file], apart=True).runs]
    return as_text(reruns(runs, float(least)), "md")


def needs(folder: Path, records: str, baseline: str, model: str, **uses: str) -> str:
    """Return by need what to type, the gap closed in each model of the records, speed and memory.

    Args:
        records, baseline: as in `sizes`. The speed limit is about the same in each model.
        model: option of the group `model`, whose memory is shown.
        uses: what is typed by need, with `method=NAME` first.
    """
    typed = pd.Series(uses)
    methods = typed.str.split().str[0].str.removeprefix("method=")
    by_model = tables_by_model(_runs(folder, records), baseline)
    frame = pd.DataFrame({"you want": typed.index, "use": ("`" + typed + "`").array})
    for name, found in by_model.items():
        gaps = found.means[GAP].rename(found.labels["method"]).map("{:.0%}".format)
        frame[f"gap closed, {name}"] = methods.map(gaps).fillna("").array
    limits = pd.concat(
        found.means[SPEED_LIMIT].rename(found.labels["method"]) for found in by_model.values()
    )
    limits = limits.groupby(level=0).first().map("{:.3g}".format)
    frame[SPEED_LIMIT] = methods.map(limits).fillna("").array
    memory_of = [gigabytes(model, words) for words in typed]
    frame[f"estimated GB for {model}, on a GPU / with layers on the host"] = memory_of
    return as_text(frame, "md")


def methods(
    folder: Path, records: str, baseline: str, model: str, text: str, others: str, **rows: str
) -> str:
    """Return perplexity and gap closed of methods in one model, and what to type for each.

    Args:
        records: files of records, in which a method of a model is one row.
        baseline: option of the group `method`, from which the gap is measured.
        model: name of the model.
        text: text whose perplexity is shown, and without which the gap is shown too.
        others: metrics of the gap in the other texts, with commas.
        rows: options of the group `method` by their labels.
    """
    found = tables_by_model(_runs(folder, records), baseline)[model]
    perplexity = f"{text} perplexity (window 256)"
    lines = [["dense", f"{found.means.at[DENSE_ROW, perplexity]:.0f}", "", "", ""]]
    for label, method in rows.items():
        row = found.labels.index[found.labels["method"] == method][0]
        gaps = [found.means.at[row, GAP], found.means.loc[row, others.split(", ")].mean()]
        shown = [f"{gap:z.0%}" for gap in gaps]
        measured = f"{found.means.at[row, perplexity]:.0f}"
        lines.append([label, measured, *shown, f"`method={method}`"])
    columns = ["perplexity", f"{GAP}, mean of three texts", f"without {text}", "what to type"]
    columns.insert(0, f"{model} at 2:4")
    return as_text(pd.DataFrame(lines, columns=columns), "md")


def sizes(folder: Path, baseline: str, methods: str, records: str = RECORDS) -> str:
    """Return the gap that methods close in each model, with the number of seeds in brackets.

    Args:
        baseline: option of the group `method`, from which the gap is measured.
        methods: options of the group `method`.
        records: files of records, in which a method of a model is one row.
    """
    by_model = tables_by_model(_runs(folder, records), baseline)
    names = methods.split()
    frame = pd.DataFrame({"method": [f"`{name}`" for name in names]})
    for model, found in by_model.items():
        rows = pd.Series(found.labels.index, found.labels["method"])
        cells = rows.map(lambda row, of=found: f"{of.shown(row, GAP)} ({len(of.members(row))})")
        frame[model] = cells.reindex(names).fillna("").array
    runs = [run for found in by_model.values() for run in found.runs]
    return f"{as_text(frame, 'md')}\n{_machine(runs)}"


def tables_by_model(runs: Iterable[Run], baseline: str) -> dict[str, Table]:
    """Return a table for each model, first of the one with the most runs.

    Args:
        runs: the runs.
        baseline: option of the group `method`, from which the gap is measured.
    """
    of_model = defaultdict(list)
    for run in runs:
        of_model[run.config["model"]["name"]].append(run)
    names = sorted(of_model, key=lambda name: -len(of_model[name]))
    return {name: table_of(of_model[name], f"method={baseline}") for name in names}


def shares(folder: Path, baseline: str, records: str = RECORDS) -> str:
    """Return the gap that methods close at 2:4, by the share of the weights that stays dense.

    Args:
        baseline: settings of the row from which the gaps are measured.
        records: files of records.
    """
    found = table_of(_runs(folder, records), baseline)
    rows = found.labels.query("sparsity == '2:4' and keep_dense == 'none'")
    rows = rows.assign(gap=found.means[GAP], limit=found.means[SPEED_LIMIT])
    rows["share"] = pd.to_numeric(rows["allocation.share"]).fillna(0.0)
    limits = rows.groupby("share")["limit"].max()
    frame = rows.pivot(index="method", columns="share", values="gap").sort_values(0.0)
    frame = frame.map("{:.0%}".format, na_action="ignore").fillna("")
    frame.columns = [f"{share:.0%} dense (limit {limits[share]:.3g})" for share in frame]
    frame.index = "`" + frame.index.str.partition(", ").get_level_values(0) + "`"
    return as_text(frame.rename_axis("method").reset_index(), "md")


def bounds(folder: Path, methods: str, records: str) -> str:
    """Return methods at 2:4 and at 6:8, with the bytes and the bound of the speed on 2:4 kernels.

    All gaps are measured from the first method at 2:4.

    Args:
        methods: options of the group `method`.
        records: files of records, which have them in both patterns.
    """
    first, *_ = methods.split()
    found = table_of(_runs(folder, records), _settings_of(f"{first},sparsity=2:4"))
    rows, costs = [], [["dense", "", "100.0%", "100.0%", "1.00"]]
    for text, method in product(("2:4", "6:8"), methods.split()):
        rows.append(_row(found, f"{method},sparsity={text}"))
        pattern = NMPattern.parse(text)
        width = 4 * window_count(pattern) / pattern.m
        sizes = [f"{stored_share(pattern, bits):.1%}" for bits in (16, 8)]
        costs.append([text, f"`{method}`", *sizes, f"{2 / width:.2f}"])
    settings = naming(found.labels, "method")
    frame = _chosen(_gap_texts(found, "method"), rows).drop(columns=settings)
    names = ["pattern", "method", "bytes, bfloat16", "bytes, FP8", "speed at most"]
    used = [run for row in rows for run in found.members(row)]
    frame = pd.DataFrame(costs, frame.index, names).join(frame)
    return f"{markdown(frame)}\n{_machine(used)}"


def options(
    folder: Path, groups: str, records: str = "", baseline: str = "", measured: str = ""
) -> str:
    """Return the options of some groups, with the comment at the head of the YAML of each.

    Args:
        groups: groups of `conf/`.
        records: files of records that have the `measured` options of the group `method`, for a
            column of the gap that each closes.
        baseline: settings of the row from which the gap is measured.
    """
    gaps = {}
    if measured:
        found = table_of(_runs(folder, records), baseline)
        for method in measured.split():
            gaps[method] = f"{found.means.at[_row(found, method), GAP]:.0%}"
    rows = []
    for group in groups.split():
        top, _, inner = group.partition("/")
        for name, head in options_of(group).items():
            typed = f"{inner}/{name}" if inner else name
            row = [f"`{top}={typed}`", head.replace("|", "\\|")]
            rows.append([*row, gaps.get(typed, "")] if gaps else row)
    columns = ["option", "what it does, costs and is good for", GAP]
    return markdown(pd.DataFrame(rows, columns=columns[: len(rows[0])]))


def placements(folder: Path, records: str) -> str:
    """Return largest memory beside the plan, and fewest seconds beside `device`."""
    runs = _runs(folder, records, apart=True)
    lines = pd.DataFrame(run.metrics for run in runs)
    lines["model"] = [run.config["model"]["name"] for run in runs]
    lines["method"] = [run.methods for run in runs]
    lines["total"] = lines["seconds"].map(lambda seconds: sum(seconds.values()))
    found = lines.groupby(["model", "method", "placement"], sort=False).agg(
        runs=("total", "size"),
        planned=("planned_memory_bytes", "max"),
        peak=("peak_memory_bytes", "max"),
        seconds=("total", "min"),
    )
    found = found.reset_index("placement").astype({"runs": str})
    on_device = found["placement"] == "device"
    device = found["seconds"][on_device].reindex(found.index)
    change = found["seconds"].mask(on_device) / device - 1
    found["beside device"] = change.map("{:+.0%}".format, "ignore").astype(object).fillna("")
    found["seconds"] = found["seconds"].map("{:.0f}".format)
    for name in ("planned", "peak"):
        found[name] = (found[name] / 1e9).map("{:.2f} GB".format)
    return f"{as_text(found.reset_index(), 'md')}\n{_machine(runs)}"


def peers(folder: Path, theirs: str) -> str:
    """Return our base pruners beside their official implementations, the CSV file `theirs`."""
    runs = _runs(folder, RECORDS)
    found = pd.read_csv(folder / theirs, dtype=str, keep_default_na=False)
    ours = [
        (method, text, result["value"], f"`{run.directory.name}`" * (which == "sparse"))
        for run in runs
        for evaluation in run.evaluations
        for which, method in (("dense", "dense"), ("sparse", run.config["pruner"]["name"]))
        for text, result in evaluation["perplexity"][which].items()
    ]
    ours = pd.DataFrame(ours, columns=["method", "name", "ours", "records"]).drop_duplicates()
    found["name"] = found["text"].str.split("-test| ", regex=True).str[0]
    found = found.merge(ours, "left", on=["method", "name"])
    found["text"] += ", " + found["windows"] + " windows of " + found["window"]
    source = (found["repository"] + " " + found["commit"]).str.strip() + ", " + found["note"]
    found["official implementation"] = source.str.strip(", ")
    change = found["ours"] / found["perplexity"].astype(float) - 1
    # The sum has no minus before a zero.
    found["difference"] = (change.round(3) + 0.0).map("{:+.1%}".format)
    found["ours"] = found["ours"].map("{:.2f}".format)
    found = found.rename(columns={"perplexity": "theirs"})
    columns = ["method", "text", "official implementation", "theirs", "ours", "difference"]
    text = as_text(found[[*columns, "records"]], "md")
    return "\n".join(["\n    python run.py experiment=peers\n", text, _provenance(runs)])


def landscape(folder: Path, theirs: str, reference: str, **ours: str) -> str:
    """Return published results, the CSV file `theirs`, by the share of the gap that they close.

    Args:
        reference: rows that measure the gap from this method are shown.
        ours: by file of records our methods, each with settings that tell its rows apart.
    """
    found = pd.read_csv(folder / theirs, dtype=str, keep_default_na=False)
    found = found[found["reference_method"] == reference]
    logarithms = np.log(found[["perplexity", "reference", "dense"]].astype(float))
    found[GAP] = gap_closed(
        logarithms["perplexity"], start=logarithms["reference"], dense=logarithms["dense"]
    )
    found["method"] += found["note"].str.startswith("second-hand").map({True: " †", False: ""})
    found["source"] = (found["source"] + "; " + found["note"]).str.removesuffix("; ")
    found = found.rename(columns={"reference": reference, "changes_weights": "weights change"})
    columns = ["method", "year", "model", "window", "dense", reference, "perplexity", GAP]
    rows = []
    for records, methods in ours.items():
        table = table_of(_runs(folder, records), _settings_of(reference.lower()))
        rows += [_measured(table, method, reference) for method in methods.split()]
    frame = pd.concat([found, pd.DataFrame(rows)])[[*columns, "weights change", "cost", "source"]]
    frame = frame.sort_values(GAP, ascending=False, kind="stable")
    frame[GAP] = frame[GAP].map("{:.1%}".format)
    return as_text(frame, "md")


def _measured(found: Table, words: str, reference: str) -> dict[str, Any]:
    """Return our row of a method; a perplexity has a number for each text."""
    names, row = found.gaps[GAP], _row(found, words)
    fastest = _fastest(found, row)
    metrics, hardware = fastest.metrics, fastest.environment["hardware"]
    values = {
        "dense": found.means.loc[DENSE_ROW, names],
        reference: found.means.loc[found.baseline, names],
        "perplexity": found.means.loc[row, names],
    }
    windows = {str(one["window"]) for one in metrics["perplexity"]["sparse"].values()}
    seeds = sorted(str(run.config["seed"]) for run in found.members(row))
    return {
        "method": f"ours: `{words.partition(',')[0]}`",
        "year": fastest.environment["started"][:4],
        "model": fastest.config["model"]["name"],
        "window": ", ".join(sorted(windows)),
        **{name: " / ".join(map("{:.2f}".format, of)) for name, of in values.items()},
        GAP: found.means.at[row, GAP],
        "weights change": "yes" if metrics["sparsity"]["weights_changed"] else "no",
        "cost": f"{fastest.minutes:.1f} minutes; {processor(fastest.environment)}, "
        f"{hardware['threads']} threads, {metrics['compute_dtype']}",
        "source": f"[frontier](../frontier/README.md), seed {', '.join(seeds)}",
    }


def study(folder: Path) -> str:
    """Return the records of a folder's measure.py as it prints them."""
    printed = import_module(f"experiments.{folder.resolve().name}.measure").lines
    parts = []
    for record in read_lines(folder / RECORDS):
        parts += [*printed(record["metrics"]["study"]), "", machine([record["environment"]]), ""]
    return "\n".join(parts)


def verified(folder: Path) -> str:
    """Return what `permllm verify --json` has written into a folder's files verify-NAME.json."""
    rows = []
    for file in sorted(folder.glob("verify-*.json")):
        report = read_json(file)
        difference = report["difference"]
        rows.append(
            {
                "checkpoint": file.stem.removeprefix("verify-"),
                "weights": str(len(report["layers"])),
                "zeros": f"{report['zeros']:.2%}",
                "violations": str(sum(layer["violations"] for layer in report["layers"])),
                "MB on disk": f"{report['bytes'] / 1e6:.1f}",
                "difference of logits": f"{difference['relative']:.1e}" if difference else "",
                "verdict": "passed" if report["passed"] else "failed",
            }
        )
    return as_text(pd.DataFrame(rows), "md")


def _settings_of(words: str) -> str:
    """Return the settings by which `find` finds the row of `METHOD,name=value,...`."""
    method, *others = words.split(",")
    config = composed([f"method={method}"])
    settings = {key.removesuffix(".name"): OmegaConf.select(config, key) for key in _OF_METHODS}
    settings |= dict(other.split("=", 1) for other in others)
    return ",".join(f"{name}={value}" for name, value in settings.items() if value)


def _row(found: Table, words: str) -> int:
    """Return the row of `METHOD,name=value,...`."""
    return find(found.labels, _settings_of(words), "view")


def _runs(folder: Path, records: str, apart: bool = False) -> list[Run]:
    """Return the runs of files of records; `apart` as in `collect`.

    Raises DataError where one of them is left out.
    """
    found = collect([folder / file for file in records.split()], apart)
    if found.notes:
        raise DataError("; ".join(found.notes))
    return found.runs


def _gap_texts(found: Table, columns: str = "") -> pd.DataFrame:
    """Return the texts of the mean gap, before those of the perplexities."""
    names = choose(found, "gap closed, perplexity (")
    names.sort(key=lambda name: name != GAP)
    without = replace(found, baseline=None)  # the gaps say it
    return texts(without, table_cells(without, names), columns)


def _chosen(frame: pd.DataFrame, rows: Iterable[int]) -> pd.DataFrame:
    """Return the dense model's cells, and those of some rows of a table in this order."""
    return frame.loc[[DENSE_ROW, *rows]]


def _fastest(found: Table, row: int) -> Run:
    """Return the fastest run of a row, because other jobs of a machine only add to the minutes."""
    return min(found.members(row), key=lambda run: run.minutes)


def _processor(run: Run) -> str:
    return processor(run.environment).replace("(R)", "").replace(" Processor", "")


def _computed_on(run: Run) -> str:
    threads = run.environment["hardware"]["threads"]
    plural = "s" * (threads > 1)
    return f"{_processor(run)}, {threads} thread{plural}, {run.metrics['compute_dtype']}"


def _machine(runs: Iterable[Run]) -> str:
    return machine(run.environment for run in runs)


def _provenance(runs: list[Run]) -> str:
    """Return number, minutes and calibration of runs, and what they were computed with."""
    minutes = sum(sum(run.metrics["seconds"].values()) for run in runs) / 60
    seeds = ", ".join(sorted({str(run.config["seed"]) for run in runs}))
    budget = runs[0].config["calibration"]
    return (
        f"{len(runs)} runs of seed {seeds}, {minutes:.0f} minutes with evaluation, "
        f"{budget['samples']} calibration windows of {budget['seqlen']} tokens. "
        "A run that is in several tables counts in each. The minutes lack the dense model's "
        f"evaluation and calibration where an earlier job had left them. {_machine(runs)}\n"
    )


_TABLES = (
    table,
    paper,
    frontier,
    sizes,
    differences,
    claims,
    repeated,
    needs,
    methods,
    shares,
    bounds,
    options,
    study,
    verified,
    placements,
    peers,
)
_VIEWS = {view.__name__: view for view in (*_TABLES, landscape, memory)}


def with_views(file: Path) -> str:
    """Return a document with each of its tables made anew.

    Raises ConfigError, which names the document.
    """

    def anew(match: re.Match[str]) -> str:
        begin, words, end = match.groups()
        name, *options = shlex.split(words)
        arguments = dict(word.partition("=")[::2] for word in options)
        folder = file.parent
        try:
            if name.endswith(".yaml"):
                arguments = dict(read_yaml(folder / name)[options[0]])
                folder = (folder / name).parent
                name = arguments.pop("view")
            text = _VIEWS[name](folder, **arguments)
        except (ConfigError, DataError, KeyError, TypeError) as error:
            valid = ", ".join(_VIEWS)
            raise ConfigError(f"{file}: view {name}: {error}; views are {valid}") from error
        return f"{begin}{text.rstrip()}\n{end}"

    return _BLOCK.sub(anew, file.read_text(encoding="utf-8"))


def main(words: list[str]) -> int:
    """Write what is stale, or name it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(words)
    new = {file: with_views(file) for file in options.files}
    stale = [file for file, text in new.items() if text != file.read_text(encoding="utf-8")]
    for file in stale:
        if not options.check:
            write_text(file, new[file])
        print(f"{file} is {'stale' if options.check else 'new'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
