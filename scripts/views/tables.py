"""Views of runs: tables, the paper's beside ours, an index of them, our pruners beside their peers."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from permllm.errors import ConfigError, DataError
from permllm.runs import evaluations
from permllm.runs.names import RECORDS
from permllm.runs.published import Comparison, Published, published
from permllm.runs.read import Run, collect
from permllm.runs.render import as_text, heading, main_measure, render, shown, take_baseline
from permllm.runs.table import Row, Summary, summarise
from scripts.views import Marker, markers

# Measures of a table that says nothing else: parts of their names.
_SHOWN = "perplexity, gap closed, average acc, saliency retained, output error, zeros, seconds"
_OFFLINE = "model=smollm2-135m protocol=offline budget=quick"


def table(folder: Path, records: str = RECORDS, baseline: str = "", columns: str = "", measures: str = _SHOWN) -> list[str]:
    """Runs as `permllm results` shows them, and what they were measured with.

    Args:
        folder: of the document.
        records: the file of the runs.
        baseline: the row that the others are compared with.
        columns: settings, with commas; whatever else varies follows from them.
        measures: with commas; each is a measure's name, or a part of those of several.
    """
    runs = runs_of(folder / records)
    summary, row = narrowed(runs, columns, measures, baseline)
    return [*render(summary, "md", row).splitlines(), "", machine(run.environment for run in runs)]


def paper(
    folder: Path,
    table: str,
    claim: str,
    baseline: str,
    columns: str = "pruner,permutation",
    measures: str = _SHOWN,
    records: str = RECORDS,
    recipe: str = "",
    command: str = "",
) -> list[str]:
    """One of the paper's tables, ours beside it.

    Args:
        folder: of the document.
        table: of the paper, such as `table6`.
        claim: what the paper shows with it, for the index.
        baseline: the row that the others are compared with.
        columns: settings that it varies, with commas; whatever else differs follows from them.
        measures: with commas; each is a part of a measure's name.
        records: the file of our runs.
        recipe: a file of runs of the paper's recipe.
        command: what was run.
    """
    runs = runs_of(folder / records)
    summary, row = narrowed(runs, columns, measures, baseline)
    compared = Comparison(published(table), runs[0].config["model"]["name"])
    lines = ["", f"    {typed(table, command)}", ""]
    note = compared.note
    if row is not None:
        note += " The gap closed is a share of the log-perplexity between the row that closes 0.00% and the dense model."
    lines += [*render(summary, "md", row, compared).splitlines(), "", note.strip(), ""]
    lines += [*_provenance(runs), ""]
    if recipe:
        of_recipe = render(narrowed(runs_of(folder / recipe), columns, measures)[0], "md").splitlines()
        lines += ["The paper's recipe at the same budget:", "", *of_recipe, ""]
    return [*lines, f"The paper's {table.replace('table', 'table ')}:", "", *published_table(published(table))]


def index(folder: Path, of: str) -> list[str]:
    """A row for each of some folders, from the first block of its README: claim, command, cost, our numbers and the paper's.

    Args:
        folder: of the document.
        of: names of the folders, with commas.
    """
    header = ["result", "the paper's claim", "command", "cost", "ours", "the paper's"]
    rows = []
    for name in of.split(","):
        first = next(markers(folder / name / "README.md"), Marker("", {}))
        entry = _entry(folder / name, first)
        cost = f"{entry.seconds / 60:.0f} min" if entry.seconds >= 60 else f"{entry.seconds:.0f} s"
        link = f"[{name}]({name}/README.md)"
        rows.append([link, entry.claim, f"`{entry.command}`", cost, entry.ours, entry.theirs])
    return ["", *as_text(pd.DataFrame(rows, columns=header), "md").splitlines()]


def peers(folder: Path, theirs: str, records: str = RECORDS, command: str = "") -> list[str]:
    """Our base pruners beside their official implementations, on each text.

    Args:
        folder: of the document.
        theirs: a CSV file of their results.
        records: the file of our runs.
        command: what was run.
    """
    runs = runs_of(folder / records)
    with open(folder / theirs, encoding="utf-8", newline="") as stream:
        rows = [_peer(peer, runs) for peer in csv.DictReader(stream)]
    header = ["method", "text", "official implementation", "theirs", "ours", "difference", "records"]
    lines = as_text(pd.DataFrame(rows, columns=header), "md").splitlines()
    return ["", f"    {command}", "", *lines, "", *_provenance(runs)]


def _peer(peer: dict[str, str], runs: list[Run]) -> list[str]:
    which = "dense" if peer["method"] == "dense" else "sparse"
    of_method = [run for run in runs if peer["method"] in ("dense", run.config["pruner"]["name"])]
    # `wikitext2-test` is our `wikitext2`.
    found = [
        (entry.get("config_hash", run.metrics["config_hash"]), result["value"])
        for run in of_method
        for entry in evaluations.all_of(run.metrics)
        for name, result in entry["perplexity"][which].items()
        if peer["text"].startswith(name)
    ]
    (value,) = {value for _, value in found}
    source = ", ".join(filter(None, (f"{peer['repository']} {peer['commit']}".strip(), peer["note"])))
    text = f"{peer['text']}, {peer['windows']} windows of {peer['window']}"
    difference = round(value / float(peer["perplexity"]) - 1, 3) + 0.0  # no minus before a zero
    kept = ", ".join(f"`{name}`" for name, _ in found if which == "sparse")
    return [peer["method"], text, source, peer["perplexity"], f"{value:.2f}", f"{difference:+.1%}", kept]


@dataclass(frozen=True)
class Entry:
    """A row of the index; `seconds` of all runs."""

    claim: str
    command: str
    ours: str
    theirs: str
    seconds: float


def _entry(folder: Path, marker: Marker) -> Entry:
    if marker.view == "study":
        from scripts.views.studies import entry

        return entry(folder, **marker.options)
    if marker.view != "paper":
        raise ConfigError(f"the first block of {folder}/README.md is no view of the paper or of a study")
    return _paper_entry(folder, **marker.options)


def _paper_entry(
    folder: Path,
    table: str,
    claim: str,
    columns: str = "pruner,permutation",
    measures: str = _SHOWN,
    records: str = RECORDS,
    command: str = "",
    **_: str,
) -> Entry:
    """Arguments as `paper`."""
    runs = runs_of(folder / records)
    summary = narrowed(runs, columns, measures)[0]
    rows, of_table = summary.rows, published(table)
    of_tasks = measures != _SHOWN  # whoever shows each task compares accuracies
    name = "average acc" if of_tasks else main_measure(summary)
    assert name is not None
    compared = Comparison(of_table, runs[0].config["model"]["name"])
    ours = "; ".join(f"{_name(row)}: {shown(row.measures[name])}" for row in rows) + heading(summary, name).removeprefix(name)
    values = [(row, value) for row in rows if (value := compared.value(row, name)) is not None]
    theirs = "; ".join(f"{_name(row)}: {f'{value:.2%}' if of_tasks else f'{value:.2f}'}" for row, value in values)
    if not theirs:  # no row of ours is one of the paper's
        metric = "average_acc" if of_tasks else "wikitext2_ppl"
        theirs = "; ".join(f"{row.setting.split('=')[-1]}: {row.value:g}" for row in of_table if row.metric == metric)
    return Entry(claim, typed(table, command), ours, theirs, sum(sum(run.metrics["seconds"].values()) for run in runs))


def runs_of(file: Path) -> list[Run]:
    """The runs of a file of records. Raises DataError where one of them is left out."""
    found = collect([file])
    if found.left_out():
        raise DataError("; ".join(found.left_out()))
    return found.runs


def typed(experiment: str, command: str = "") -> str:
    """The command of an experiment on two cores, unless another one is given."""
    return command or f"python run.py experiment={experiment} {_OFFLINE}"


def published_table(rows: list[Published]) -> list[str]:
    """All numbers of one of the paper's tables, metrics across."""
    keys = ["model", "sparsity", "method", "setting"]
    numbers = pd.DataFrame([vars(row) for row in rows])
    across = numbers.pivot(index=keys, columns="metric", values="value")  # sorted, which the paper's are not
    across = across.reindex(
        index=pd.MultiIndex.from_frame(numbers[keys].drop_duplicates()), columns=numbers["metric"].unique()
    )
    texts = across.map(lambda value: "" if pd.isna(value) else f"{value:g}").reset_index()
    return as_text(texts, "md").splitlines()


def machine(environments: Iterable[dict[str, Any]]) -> str:
    """What records were computed with, in a line."""
    entries = list(environments)
    hardware = sorted({computed_on(e["hardware"]) for e in entries})
    versions = sorted(
        {
            f"Python {e['versions']['python']}, torch {e['versions']['torch']}, transformers {e['versions']['transformers']}"
            for e in entries
        }
    )
    commits = sorted({e["git"]["commit"][:10] + " with changes" * e["git"]["dirty"] for e in entries if e.get("git")})
    started = sorted(e["started"][:10] for e in entries)
    of_code = [f"commit {', '.join(commits)}"] if commits else []
    days = " to ".join(dict.fromkeys((started[0], started[-1])))
    return "; ".join([*hardware, *versions, *of_code, days]) + "."


def computed_on(hardware: dict[str, Any]) -> str:
    """The processor with its vector instructions, or the GPU; threads; processes, if there are several."""
    instructions = f" ({hardware['instructions']})" if "instructions" in hardware and "gpu" not in hardware else ""
    several = f", {hardware['processes']} processes" if "processes" in hardware else ""
    return f"{processor(hardware)}{instructions}, {hardware['threads']} threads{several}"


def processor(hardware: dict[str, Any]) -> str:
    """The GPU that something was computed on, or else the processor."""
    return str(hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"])


def narrowed(runs: list[Run], columns: str, measures: str, baseline: str = "") -> tuple[Summary, Row | None]:
    """A table with some of its columns, and the row of it that the others are compared with."""
    summary = summarise(runs)
    if columns:
        summary.settings = [name for name in summary.settings if name in columns.split(",")]
    for row in summary.rows:
        row.labels = {name: row.labels[name] for name in summary.settings}
    reference = take_baseline(summary, baseline)
    asked = measures.split(", ")
    # A measure's whole name is that one alone: the mean gap without those of each text.
    whole = [part for part in asked if part in summary.measures]
    parts = [part for part in asked if part not in whole]
    summary.measures = [name for name in summary.measures if name in whole or any(part in name for part in parts)]
    return summary, reference


def _name(row: Row) -> str:
    return " ".join(value for value in row.labels.values() if value)


def _provenance(runs: list[Run]) -> list[str]:
    seconds = sum(sum(run.metrics["seconds"].values()) for run in runs)
    seeds = ", ".join(sorted({str(run.config["seed"]) for run in runs}))
    budget = runs[0].config["calibration"]
    return [
        f"{len(runs)} runs, {seconds / 60:.0f} minutes, evaluation included. Runs of several tables count in each; what "
        "an earlier job had left of the dense model's evaluation and calibration does not. "
        f"Seed {seeds}; calibrated on {budget['samples']} samples of {budget['seqlen']} tokens. "
        + machine(run.environment for run in runs)
    ]
